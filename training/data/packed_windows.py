"""Windows of a fixed length over concatenated sequences, for causal language models."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


class PackedWindows:
    """Sequences one after the other, cut into windows: no token is padding but at the very end.

    Tokens of a window attend within their own sequence (`segment_ids`) and count their `positions`
    from its start, and the last token of a sequence predicts nothing. A sequence longer than a
    window starts over in the next one, without what came before.

    **Shapes** T is the length of a window.

    **Args**
        sequences: Token ids, start and end tokens included, one vector per sequence.
        length: T.
        pad_token_id: What the last window ends with.

    **Example**

    >>> windows = PackedWindows([np.array([1, 7, 2]), np.array([1, 8, 9, 2])], 5, pad_token_id=0)
    >>> x, y, sample_weight = windows.read([0])
    >>> x["token_ids"].tolist(), y.tolist()
    ([[1, 7, 2, 1, 8]], [[7, 2, 1, 8, 9]])
    >>> x["segment_ids"].tolist(), sample_weight.tolist()
    ([[0, 0, 0, 1, 1]], [[1.0, 1.0, 0.0, 1.0, 1.0]])
    >>> x["positions"].tolist()
    [[0, 1, 2, 0, 1]]
    """

    def __init__(self, sequences: Sequence[np.ndarray], length: int, pad_token_id: int):
        self.length = length
        sizes = [len(sequence) for sequence in sequences]
        self.num_tokens = sum(sizes)
        room = (-self.num_tokens) % length + 1
        self._tokens = np.full(self.num_tokens + room, pad_token_id, "int32")
        self._sequences = np.full(self.num_tokens + room, -1, "int32")
        self._tokens[: self.num_tokens] = np.concatenate(sequences)
        self._sequences[: self.num_tokens] = np.repeat(np.arange(len(sizes)), sizes)

    def __len__(self) -> int:
        """Return the number of windows that do not overlap."""
        return -(-self.num_tokens // self.length)

    def read(self, indices: Any, rng: np.random.Generator | None = None) -> Batch:
        """Return the windows of these indices.

        **Args**
            indices: B numbers below `len`.
            rng: Moves each window by up to T tokens, so that no pass cuts where another one does.
                None reads them where they are.

        **Returns** `(x, y, sample_weight)`: x holds `token_ids`, `padding_mask`, `segment_ids` and
        `positions` (B, T); y (B, T) the tokens that follow; sample_weight (B, T) float32 is 1 where
        the token that follows belongs to the same sequence.
        """
        starts = np.asarray(indices) * self.length
        if rng is not None and self.num_tokens > self.length:
            starts = starts + rng.integers(self.length, size=len(starts))
            starts = np.minimum(starts, self.num_tokens - self.length)
        places = starts[:, None] + np.arange(self.length + 1)
        tokens, sequences = self._tokens[places], self._sequences[places]
        here, following = sequences[:, :-1], sequences[:, 1:]
        index = np.arange(self.length, dtype="int32")
        begins = np.diff(here, axis=1, prepend=here[:, :1]) != 0
        x = {
            "token_ids": tokens[:, :-1],
            "padding_mask": (here >= 0).astype("int32"),
            # Small numbers: only changes count, and large ones would not survive every format.
            "segment_ids": here - here[:, :1],
            "positions": index - np.maximum.accumulate(np.where(begins, index, 0), 1),
        }
        return x, tokens[:, 1:], ((here == following) & (here >= 0)).astype("float32")

    def sequences_of(self, index: int) -> np.ndarray:
        """Return the number of the sequence (T,) that each token of a window belongs to."""
        start = index * self.length
        return self._sequences[start : start + self.length]

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
        """Walk over all windows in order, each once: their indices and what `read` returns."""
        for start in range(0, len(self), batch_size):
            indices = np.arange(start, min(start + batch_size, len(self)))
            yield indices, self.read(indices)
