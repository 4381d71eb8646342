"""Rows of token ids as the rectangular inputs of an encoder, made with NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def pad_rows(
    rows: Sequence[np.ndarray], longest: int, length_multiple: int, pad: int = 0
) -> dict[str, np.ndarray]:
    """Pad rows to one length.

    **Args**
        rows: B vectors of at most `longest` token ids.
        longest: The longest length T there may be.
        length_multiple: The batch ends at the smallest multiple of this number that holds its
            longest row, and at the latest at `longest`. 0 always takes `longest`.
        pad: The id of padding.

    **Returns** `token_ids` and `padding_mask` (B, T), int32.

    **Example**

    >>> pad_rows([np.array([7, 8, 9]), np.array([5])], 10, 2)["token_ids"].tolist()
    [[7, 8, 9, 0], [5, 0, 0, 0]]
    """
    total = longest
    if length_multiple:
        needed = max(len(row) for row in rows)
        total = min(longest, -(-needed // length_multiple) * length_multiple)
    token_ids = np.full((len(rows), total), pad, "int32")
    padding_mask = np.zeros((len(rows), total), "int32")
    for place, mask, row in zip(token_ids, padding_mask, rows, strict=True):
        place[: len(row)] = row
        mask[: len(row)] = 1
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def bracket(row: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Return a row with the tokenizer's start and end token around it."""
    return np.concatenate(([tokenizer.start_token_id], row, [tokenizer.end_token_id]))
