"""The Transformer encoder block of the Performer models."""

import numbers
from typing import Any

import keras
from keras import ops

from keras_performer.layers.performer_attention import PerformerAttention


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int, or raise a ValueError that names the argument.

    **Args**
        name: The argument's name, for the message.
        value: What the caller passed.

    **Returns** `value` as a built-in int.

    **Raises** ValueError if it is not an integer above zero.

    **Example**

    >>> positive_int("num_heads", 4)
    4
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer above zero. Received: {name}={value!r}")
    return int(value)


def dropout_rate(name: str, value: float) -> float:
    """Return `value` if it is a rate of dropout, or raise a ValueError that names the argument.

    **Args**
        name: The argument's name, for the message.
        value: What the caller passed.

    **Returns** `value`.

    **Raises** ValueError if it is not at least 0 and below 1.

    **Example**

    >>> dropout_rate("dropout", 0.1)
    0.1
    """
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1. Received: {name}={value}")
    return value


def split_width(hidden_dim: int, num_heads: int, rotary: bool, key_dim: int | None) -> int:
    """Return the head size H: `key_dim`, or an equal share of the width D.

    **Args**
        hidden_dim: Width D.
        num_heads: Number of heads N.
        rotary: Whether positions are rotary, which needs an even head size.
        key_dim: H, or None for D/N.

    **Returns** H.

    **Raises** ValueError if D does not divide by N, or if `rotary` and H is odd.

    **Example**

    >>> split_width(64, 4, rotary=True, key_dim=None)
    16
    """
    if key_dim is None:
        if hidden_dim % num_heads:
            raise ValueError(
                "The model width must be a multiple of `num_heads` when `key_dim` is None. "
                f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}. Change one of them, or "
                "pass `key_dim`."
            )
        key_dim = hidden_dim // num_heads
    if rotary and key_dim % 2:
        raise ValueError(
            "Rotary positions rotate pairs of channels and need an even head size. Received: "
            f"head size {key_dim} (hidden_dim={hidden_dim}, num_heads={num_heads}). Pass an even "
            "`key_dim` or `rotary_max_wavelength=None`."
        )
    return key_dim


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerEncoderBlock(keras.layers.Layer):
    """A bidirectional Transformer block whose attention costs linear time.

    With x the input, h = x + attention(norm(x)) and the output is h + feed_forward(norm(h)): both
    residual branches are normalised at their input (pre-norm). The feed-forward part is
    W2 act(W1 h), or W2 (act(Wg h) * W1 h) when `gated`. Stack it to encode long sequences; use it
    in functional and Sequential models like any Keras layer.

    **Shapes** `inputs` (B, T, D); `padding_mask`, `segment_ids` and `positions` (B, T); the output
    is (B, T, D).

    **Args**
        num_heads: Number of query heads N.
        intermediate_dim: Width of the feed-forward part.
        key_dim: Head size H. Default: D/N.
        num_key_value_heads: Number of key/value heads K, a divisor of N. Default: N.
        num_features: Number of features M. Default: what the feature map chooses.
        feature_map: Name, config or instance of a feature map; an instance is copied by its config.
        qk_norm: Whether queries and keys are normalised, with a learned temperature. It keeps the
            variance of the random features bounded, so it is on by default here.
        rotary_max_wavelength: Longest wavelength of the rotary positions. None turns them off, and
            the block is then blind to order.
        gated: Whether the feed-forward part is a gated linear unit (three matrices, not two).
        activation: Activation of the feed-forward part.
        dropout: Rate of dropout on both residual branches.
        attention_dropout: Rate at which attention drops whole keys.
        layer_norm_epsilon: Epsilon of the two layer normalisations.
        use_bias: Whether the dense layers have biases.
        kernel_initializer: Initializer of every kernel.
        seed: Seed of the random features and of dropout. Weights draw from `kernel_initializer`.
        **kwargs: `name`, `dtype` and `trainable` of the layer.

    **Returns** A tensor of the shape and compute dtype of `inputs`.

    **Masking** `padding_mask` is True (or not 0) where a token takes part. A masked token is no key
    for anyone; its own output is a number without meaning. Without `padding_mask` the Keras mask of
    `inputs` is used, and passed on. With both, a token takes part if both say so. Tokens of
    different `segment_ids` do not see each other. With rotary positions, give each segment
    `positions` that restart at 0: scores depend on distances only, but their random features
    depend on the positions, so a packed sequence would not equal the same sequence alone.

    **Precision** Every sublayer has this layer's dtype policy; attention accumulates in float32.

    **Cost** O(T M (H + V) N) for attention, O(T D intermediate_dim) for the feed-forward part.

    **Raises** ValueError for sizes that are not positive integers, a rate outside [0, 1), heads
    that do not divide the width, or an odd head size with rotary positions.

    **Example**

    >>> block = PerformerEncoderBlock(num_heads=2, intermediate_dim=32, num_features=16)
    >>> tuple(block(keras.ops.ones((1, 5, 8))).shape)
    (1, 5, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, for the attention; the block is pre-norm
    (Xiong et al. 2020, arXiv 2002.04745), where the paper's models are post-norm.
    """

    def __init__(
        self,
        num_heads: int,
        intermediate_dim: int,
        key_dim: int | None = None,
        num_key_value_heads: int | None = None,
        num_features: int | None = None,
        feature_map: Any = "favor_plus",
        qk_norm: bool = True,
        rotary_max_wavelength: float | None = 10000,
        gated: bool = False,
        activation: Any = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = positive_int("num_heads", num_heads)
        self.intermediate_dim = positive_int("intermediate_dim", intermediate_dim)
        self.key_dim = None if key_dim is None else positive_int("key_dim", key_dim)
        self.num_key_value_heads = None
        if num_key_value_heads is not None:
            self.num_key_value_heads = positive_int("num_key_value_heads", num_key_value_heads)
            if self.num_heads % self.num_key_value_heads:
                raise ValueError(
                    "`num_key_value_heads` must divide `num_heads`. Received: "
                    f"num_key_value_heads={num_key_value_heads}, num_heads={num_heads}"
                )
        self.num_features = (
            None if num_features is None else positive_int("num_features", num_features)
        )
        if rotary_max_wavelength is not None and rotary_max_wavelength <= 0:
            raise ValueError(
                "`rotary_max_wavelength` must be above zero, or None for no rotary positions. "
                f"Received: rotary_max_wavelength={rotary_max_wavelength}"
            )
        # Kept as a config: the map that is used belongs to `attention`, and to nothing else.
        if isinstance(feature_map, keras.layers.Layer):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        self.feature_map = feature_map
        self.qk_norm = qk_norm
        self.rotary_max_wavelength = rotary_max_wavelength
        self.gated = gated
        self.activation = keras.activations.get(activation)
        self.dropout = dropout_rate("dropout", dropout)
        self.attention_dropout = dropout_rate("attention_dropout", attention_dropout)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.seed = seed

    def build(self, inputs_shape: tuple[int | None, ...]) -> None:
        """Create the sublayers for inputs (B, T, D)."""
        hidden_dim = inputs_shape[-1]
        if len(inputs_shape) != 3 or hidden_dim is None:
            raise ValueError(
                "PerformerEncoderBlock expects inputs (batch, length, width) of known width. "
                f"Received: inputs.shape={tuple(inputs_shape)}"
            )
        rotary = self.rotary_max_wavelength is not None
        self.attention_norm = self._build_norm("attention_norm", inputs_shape)
        self.attention = PerformerAttention(
            num_heads=self.num_heads,
            key_dim=split_width(hidden_dim, self.num_heads, rotary, self.key_dim),
            dropout=self.attention_dropout,
            use_bias=self.use_bias,
            kernel_initializer=self.kernel_initializer.clone(),
            num_features=self.num_features,
            feature_map=self.feature_map,
            num_key_value_heads=self.num_key_value_heads,
            qk_norm=self.qk_norm,
            rotary_max_wavelength=self.rotary_max_wavelength,
            seed=self.seed,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.attention.build(inputs_shape, inputs_shape)
        self.attention_residual_dropout = self._build_dropout("attention_residual_dropout", 1)

        self.feedforward_norm = self._build_norm("feedforward_norm", inputs_shape)
        inner_shape = (*inputs_shape[:-1], self.intermediate_dim)
        self.feedforward_intermediate = self._build_dense(
            "feedforward_intermediate",
            self.intermediate_dim,
            inputs_shape,
            None if self.gated else self.activation,
        )
        self.feedforward_gate = None
        if self.gated:
            self.feedforward_gate = self._build_dense(
                "feedforward_gate", self.intermediate_dim, inputs_shape, self.activation
            )
        self.feedforward_output = self._build_dense(
            "feedforward_output", hidden_dim, inner_shape, None
        )
        self.feedforward_residual_dropout = self._build_dropout("feedforward_residual_dropout", 2)

    def _build_norm(self, name: str, shape: tuple[int | None, ...]) -> keras.layers.Layer:
        norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build(shape)
        return norm

    def _build_dense(
        self, name: str, units: int, shape: tuple[int | None, ...], activation: Any
    ) -> keras.layers.Layer:
        dense = keras.layers.Dense(
            units,
            activation=activation,
            use_bias=self.use_bias,
            # One instance draws the same numbers each time, so every kernel gets its own.
            kernel_initializer=self.kernel_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build(shape)
        return dense

    def _build_dropout(self, name: str, stream: int) -> keras.layers.Layer:
        return keras.layers.Dropout(
            self.dropout,
            seed=None if self.seed is None else self.seed + stream,
            dtype=self.dtype_policy,
            name=name,
        )

    def call(
        self,
        inputs: Any,
        padding_mask: Any = None,
        segment_ids: Any = None,
        positions: Any = None,
        training: bool | None = None,
    ) -> Any:
        """Encode `inputs`.

        **Args**
            inputs: (B, T, D).
            padding_mask: (B, T), True or not 0 where a token takes part.
            segment_ids: (B, T) integers; tokens attend within a run of equal ids.
            positions: (B, T) positions for the rotary rotation. Default: the distance from the
                row's first token that takes part.
            training: Whether dropout is applied.

        **Returns** (B, T, D).
        """
        key_mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
        # The norm hands the Keras mask of `inputs` on, and attention takes it as its value mask.
        x = self.attention_norm(inputs)
        x = self.attention(
            x,
            x,
            key_mask=key_mask,
            segment_ids=segment_ids,
            positions=positions,
            training=training,
        )
        hidden = inputs + self.attention_residual_dropout(x, training=training)

        x = self.feedforward_norm(hidden)
        inner = self.feedforward_intermediate(x)
        if self.feedforward_gate is not None:
            inner = inner * self.feedforward_gate(x)
        x = self.feedforward_output(inner)
        return hidden + self.feedforward_residual_dropout(x, training=training)

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output, which is that of the input."""
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "intermediate_dim": self.intermediate_dim,
            "key_dim": self.key_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "num_features": self.num_features,
            "feature_map": self.feature_map,
            "qk_norm": self.qk_norm,
            "rotary_max_wavelength": self.rotary_max_wavelength,
            "gated": self.gated,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "seed": self.seed,
        }
