"""The walk over a data set that every recipe trains on: endless, shuffled, and repeatable."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np


class Batches(keras.utils.PyDataset):
    """An endless shuffled walk over examples, cut into epochs of a fixed number of steps.

    Every pass over the examples has an order of its own. A batch depends on the seed and the number
    of its step, and nothing else: not on the backend, nor on whether the run was killed and
    resumed. Set `epoch` at the start of each epoch.

    With `bucket_batches` = n examples of like length share a batch: the next n batches' examples
    are sorted by length, cut into batches, and the batches shuffled.

    **Args**
        lengths: Length of each example; the number of lengths is that of the examples.
        make_batch: Function of the indices of B examples and a NumPy generator that returns what
            `fit` takes.
        batch_size: B.
        steps_per_epoch: Batches in an epoch.
        seed: Seed of everything random.
        bucket_batches: Number of batches that are sorted together; 1 keeps the random order.

    **Example**

    >>> batches = Batches([3, 1, 2], lambda i, rng: i, batch_size=2, steps_per_epoch=3, seed=0)
    >>> sorted(int(i) for step in range(3) for i in batches[step])
    [0, 0, 1, 1, 2, 2]
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        make_batch: Callable[[np.ndarray, np.random.Generator], Any],
        batch_size: int,
        steps_per_epoch: int,
        seed: int,
        bucket_batches: int = 1,
    ):
        super().__init__()
        self.lengths = np.asarray(lengths)
        self.make_batch = make_batch
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.bucket_batches = bucket_batches
        self.epoch = 0
        self.seconds = 0.0  # spent on making batches so far
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))
        self._bucket: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.steps_per_epoch

    def __getitem__(self, index: int) -> Any:
        """Return the batch of this index in the current epoch."""
        started = time.perf_counter()
        step = self.epoch * self.steps_per_epoch + index
        batch = self.make_batch(self._examples(step), np.random.default_rng((self.seed, 0, step)))
        self.seconds += time.perf_counter() - started
        return batch

    def _examples(self, step: int) -> np.ndarray:
        """Return the indices (B,) of the examples of a step."""
        number, row = divmod(step, self.bucket_batches)
        if self._bucket[0] != number:
            size = self.bucket_batches * self.batch_size
            examples = np.array([self._example(number * size + i) for i in range(size)])
            if self.bucket_batches > 1:
                examples = examples[np.argsort(self.lengths[examples], kind="stable")]
            rows = np.random.default_rng((self.seed, 2, number)).permutation(self.bucket_batches)
            if number == 0 and len(rows) > 2:
                # The longest batch comes first, so that memory that is too small shows at once, and
                # the shortest second: from these two TensorFlow learns that lengths differ.
                longest, shortest = len(rows) - 1, 0
                rows = np.array([longest, shortest, *rows[(rows != longest) & (rows != shortest)]])
            self._bucket = (number, examples.reshape(-1, self.batch_size)[rows])
        return self._bucket[1][row]

    def _example(self, place: int) -> int:
        """Return the index of the example at a place of the endless walk."""
        number, index = divmod(place, len(self.lengths))
        if self._order[0] != number:
            order = np.random.default_rng((self.seed, 1, number)).permutation(len(self.lengths))
            self._order = (number, order)
        return self._order[1][index]
