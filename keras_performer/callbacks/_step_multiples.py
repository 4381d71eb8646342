"""When the optimizer's step count passes a multiple of a number."""

from typing import Any

import keras


class StepMultiples:
    """Tells a callback, after each batch, whether the step count has passed a multiple of `every`.

    The count is that of the optimizer, so a resumed run goes on where it was. With
    `steps_per_execution` a callback sees the last batch of a group only, and the count jumps.

    **Args**
        every: The number whose multiples are looked for.

    **Example** A callback calls `start` in `on_epoch_begin` and `passed` in `on_train_batch_end`.

    >>> multiples = StepMultiples(4)
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._group = self._most = self._next = 0

    def start(self, model: Any) -> None:
        """Begin to count from the model's present step."""
        self._begin(model, step_count(model))

    def _begin(self, model: Any, step: int) -> None:
        self._group = model.steps_per_execution
        self._most = step
        self._next = (step // self.every + 1) * self.every

    def passed(self, callback: keras.callbacks.Callback) -> int | None:
        """The largest multiple passed since it was last asked, or None."""
        if not self._next:  # a loop of the user's own, which calls `on_train_batch_end` only
            model = callback.model
            self._begin(model, step_count(model) - model.steps_per_execution)
        # Under JAX `callback.model` puts all values back into the variables, so it is asked for
        # only when the count may have come far enough. Steps that the optimizer skips or
        # accumulates leave it behind this upper bound.
        self._most += self._group
        if self._most < self._next:
            return None
        self._most = step_count(callback.model)
        if self._most < self._next:
            return None
        passed = self._most // self.every * self.every
        self._next = passed + self.every
        return passed


def step_count(model: Any) -> int:
    """The number of steps that the model's optimizer has taken."""
    if getattr(model, "optimizer", None) is None:
        raise ValueError(
            "Steps are those of the model's optimizer: compile the model, also where a loop of "
            "your own trains it, with that optimizer. Received: model "
            f"{model.name!r}, not compiled"
        )
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


def is_built(model: Any) -> bool:
    """Whether all layers have their weights; on TensorFlow `fit` builds with the first batch."""
    return all(layer.built for layer in model._flatten_layers())
