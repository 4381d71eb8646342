"""Masked batches of sequences, made with NumPy: the same on every backend and after a resume.

keras-hub's own pipeline masks in TensorFlow or in Python, with different random numbers, and starts
over when a run is resumed. It also cuts long sequences at their start only. Here a batch depends on
its sequences and its generator, and nothing else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_performer.models import PerformerMaskedLMPreprocessor

Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def mask_sequences(
    sequences: Sequence[np.ndarray],
    preprocessor: PerformerMaskedLMPreprocessor,
    rng: np.random.Generator,
    always_mask: bool = False,
    length_multiple: int = 0,
) -> Batch:
    """Crop, pack and mask sequences as the preprocessor would pack and mask their strings.

    Other than there, no special token replaces another at random.

    **Shapes** B is the number of sequences, T the preprocessor's `sequence_length`, P the number of
    tokens masked in a sequence of full length.

    **Args**
        sequences: Token ids without special tokens, one vector per sequence. What is longer than
            T - 2 is cropped to a random window.
        preprocessor: Gives the length, the special tokens and the rates.
        rng: Source of all random choices.
        always_mask: Replace every selected token by the mask token, as for scoring. Otherwise
            some become random tokens and some stay, by the preprocessor's rates.
        length_multiple: Where the batch ends: at the smallest multiple of this number that holds
            its longest sequence, and at the latest at T. 0 always takes T.

    **Returns** `(x, y, sample_weight)`: x holds `token_ids` (B, T), `padding_mask` (B, T) and
    `mask_positions` (B, P), all int32; y (B, P) int32 holds the true tokens; sample_weight (B, P)
    float32 is 1 at masked tokens and 0 at unused places.
    """
    tokenizer: Any = preprocessor.tokenizer
    room = preprocessor.sequence_length - 2
    rate = preprocessor.mask_selection_rate
    special = list(tokenizer.special_token_ids)
    ordinary = np.setdiff1d(np.arange(tokenizer.vocabulary_size()), special)
    total = preprocessor.sequence_length
    if length_multiple:
        longest = max(len(sequence) for sequence in sequences) + 2
        total = min(total, -(-longest // length_multiple) * length_multiple)
    num_places = max(1, round(rate * (total - 2)))

    shape = (len(sequences), total)
    token_ids = np.full(shape, tokenizer.pad_token_id, "int32")
    padding_mask = np.zeros(shape, "int32")
    mask_positions = np.zeros((len(sequences), num_places), "int32")
    labels = np.zeros((len(sequences), num_places), "int32")
    weights = np.zeros((len(sequences), num_places), "float32")
    for row, sequence in enumerate(sequences):
        start = rng.integers(max(1, len(sequence) - room + 1))
        window = sequence[start : start + room]
        length = len(window)
        token_ids[row, 0] = tokenizer.start_token_id
        token_ids[row, 1 : length + 1] = window
        token_ids[row, length + 1] = tokenizer.end_token_id
        padding_mask[row, : length + 2] = 1

        candidates = np.flatnonzero(~np.isin(window, special)) + 1
        count = min(len(candidates), max(1, round(rate * len(candidates))))
        positions = np.sort(rng.permutation(candidates)[:count])
        mask_positions[row, :count] = positions
        labels[row, :count] = token_ids[row, positions]
        weights[row, :count] = 1

        fate = rng.random(count)
        random_tokens = rng.choice(ordinary, count)
        masked = always_mask | (fate < preprocessor.mask_token_rate)
        replaced = fate < preprocessor.mask_token_rate + preprocessor.random_token_rate
        token_ids[row, positions] = np.where(
            masked, tokenizer.mask_token_id, np.where(replaced, random_tokens, labels[row, :count])
        )
    x = {"token_ids": token_ids, "padding_mask": padding_mask, "mask_positions": mask_positions}
    return x, labels, weights
