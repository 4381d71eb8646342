"""One vector for each sequence."""

from typing import Any

import keras
from keras import ops

POOLINGS = ("mean", "first", "last")


@keras.saving.register_keras_serializable(package="keras_performer")
class MaskedPooling(keras.layers.Layer):
    """Pool the hidden states (B, T, D) of tokens that take part into (B, D).

    A row without any such token gives zeros.

    **Args**
        pooling: "mean" of the tokens that `padding_mask` keeps, or the "first" or "last" of them.
        **kwargs: `name` and `dtype` of the layer.

    **Example**

    >>> x, mask = np.array([[[1.0], [3.0], [9.0]]], "float32"), np.array([[1, 1, 0]])
    >>> [float(MaskedPooling(pooling)(x, mask)[0, 0]) for pooling in POOLINGS]
    [2.0, 1.0, 3.0]
    """

    def __init__(self, pooling: str, **kwargs: Any):
        super().__init__(**kwargs)
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {POOLINGS}. Received: pooling={pooling!r}")
        self.pooling = pooling

    def call(self, hidden: Any, padding_mask: Any) -> Any:
        """Pool `hidden` (B, T, D) under `padding_mask` (B, T)."""
        mask = ops.cast(ops.cast(padding_mask, "bool"), "int32")
        rank = ops.cumsum(mask, axis=-1)
        count = ops.sum(mask, axis=-1, keepdims=True)
        if self.pooling == "first":
            mask = mask * ops.cast(rank == 1, "int32")
        elif self.pooling == "last":
            mask = mask * ops.cast(rank == count, "int32")
        weights = ops.expand_dims(ops.cast(mask, hidden.dtype), -1)
        # Chosen, not multiplied: padding may hold anything.
        pooled = ops.sum(ops.where(weights > 0, hidden, ops.zeros_like(hidden)), axis=1)
        if self.pooling == "mean":
            pooled = pooled / ops.cast(ops.maximum(count, 1), hidden.dtype)
        return pooled

    def compute_output_shape(self, hidden_shape: Any, padding_mask_shape: Any = None) -> Any:
        """The shape (B, D)."""
        return (hidden_shape[0], hidden_shape[-1])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "pooling": self.pooling}
