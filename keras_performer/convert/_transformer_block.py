"""What the stand-ins for keras-hub's Transformer layers share."""

from collections.abc import Callable
from typing import Any

import keras
from keras.src.backend import get_keras_mask

from keras_performer.layers import PerformerAttention


class TransformerBlock(keras.layers.Layer):
    """The abstract block: residual branches of attention and of a feed-forward part.

    A subclass defines `build` and `call`.

    **Args** Those that `PerformerTransformerEncoder` documents.
    """

    def __init__(
        self,
        intermediate_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        activation: Any = "relu",
        layer_norm_epsilon: float = 1e-5,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        normalize_first: bool = False,
        use_bias: bool = True,
        attention: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)  # as in `PerformerAttention`
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.activation = keras.activations.get(activation)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.normalize_first = normalize_first
        self.use_bias = use_bias
        self.attention = as_config(attention or {})
        # Refuses here what `build` would refuse.
        PerformerAttention(num_heads, 2, dropout=dropout, **self.attention)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "activation": keras.activations.serialize(self.activation),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "normalize_first": self.normalize_first,
            "use_bias": self.use_bias,
            "attention": self.attention,
        }

    def _build_attention(
        self, name: str, query_shape: Any, value_shape: Any, options: dict[str, Any]
    ) -> PerformerAttention:
        if len(query_shape) != 3 or not query_shape[-1] or query_shape[-1] < self.num_heads:
            raise ValueError(
                f"{type(self).__name__} expects inputs (batch, length, width) with a width of at "
                f"least num_heads={self.num_heads}. Received: shape {tuple(query_shape)}"
            )
        layer = PerformerAttention(
            self.num_heads,
            query_shape[-1] // self.num_heads,
            dropout=self.dropout,
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            dtype=self.dtype_policy,
            name=name,
            **options,
        )
        layer.build(query_shape, value_shape)
        return layer

    def _build_ends(self, part: str, shape: Any) -> tuple[Any, Any]:
        """The normalization and the dropout of a branch."""
        norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=f"{part}_layer_norm"
        )
        norm.build(shape)
        dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name=f"{part}_dropout"
        )
        return norm, dropout

    def _build_feedforward(self, shape: Any) -> None:
        self.feedforward_layer_norm, self.feedforward_dropout = self._build_ends(
            "feedforward", shape
        )
        inner = (*shape[:-1], self.intermediate_dim)
        self.feedforward_intermediate_dense = self._build_dense(
            "feedforward_intermediate_dense", self.intermediate_dim, shape, self.activation
        )
        self.feedforward_output_dense = self._build_dense(
            "feedforward_output_dense", shape[-1], inner, None
        )

    def _build_dense(self, name: str, units: int, shape: Any, activation: Any) -> Any:
        dense = keras.layers.Dense(
            units,
            activation=activation,
            use_bias=self.use_bias,
            # Initializers keep state, so each sublayer has its own.
            kernel_initializer=self.kernel_initializer.clone(),
            bias_initializer=self.bias_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build(shape)
        return dense

    def _residual(
        self, x: Any, branch: Callable[[Any], Any], norm: Any, dropout: Any, training: bool | None
    ) -> Any:
        """Add a branch to x, normalised before it or after the sum."""
        x = keras.ops.cast(x, self.compute_dtype)
        branched = dropout(branch(norm(x) if self.normalize_first else x), training=training)
        return x + branched if self.normalize_first else norm(x + branched)

    def _feedforward(self, x: Any, training: bool | None) -> Any:
        def branch(x: Any) -> Any:
            return self.feedforward_output_dense(self.feedforward_intermediate_dense(x))

        return self._residual(
            x, branch, self.feedforward_layer_norm, self.feedforward_dropout, training
        )


def key_mask(inputs: Any, padding_mask: Any) -> Any:
    """The mask of keys as keras-hub takes it: `padding_mask`, or else that of `inputs`."""
    return get_keras_mask(inputs) if padding_mask is None else padding_mask


def as_config(attention: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `PerformerAttention`, with a feature map as its config."""
    feature_map = attention.get("feature_map")
    if isinstance(feature_map, keras.layers.Layer):
        return {**attention, "feature_map": keras.saving.serialize_keras_object(feature_map)}
    return dict(attention)


def with_seed(attention: dict[str, Any], index: int) -> dict[str, Any]:
    """The arguments for the layer of an index: a seed is that of the first one."""
    if attention.get("seed") is None:
        return attention
    return {**attention, "seed": attention["seed"] + index}
