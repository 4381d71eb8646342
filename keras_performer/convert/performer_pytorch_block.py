"""The Transformer block of performer-pytorch."""

from typing import Any

import keras
from keras import ops

from keras_performer.layers import PerformerAttention

NORMS = ("layer", "scale", "rezero")
_EPSILON = 1e-5


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerPytorchBlock(keras.layers.Layer):
    """Attention and a feed-forward part as performer-pytorch has them.

    h = x + attention(x) and the output is h + feed_forward(h), where either branch normalises its
    input ("layer", or "scale": x / |x| times one learned number) or multiplies its output by one
    learned number ("rezero"), and may shift a part of its input by one token.

    **Shapes** (B, T, D) -> (B, T, D); with `reversible` (B, T, 2D), two streams side by side, of
    which the first gets the attention of the second, and the second the feed-forward of the first.

    **Args**
        num_heads: Number of heads N.
        key_dim: Head size H.
        intermediate_dim: Width of the feed-forward part.
        causal: Whether tokens see only what is before them.
        norm: "layer", "scale" or "rezero".
        gated: Whether the feed-forward part is a gated linear unit.
        shift_tokens: Whether the second half of the features comes from the token before (causal),
            or the first third from the token after and the last from the one before.
        rotary: Whether queries and keys have rotary positions.
        use_bias: Whether the projections of attention have biases; those of the feed-forward do.
        reversible: Whether inputs are two streams. It saves no memory here.
        feature_map: As in `PerformerAttention`.
        attention_dropout: Rate of dropout on the output of attention.
        feedforward_dropout: Rate of dropout inside the feed-forward part.
        **kwargs: `name`, `dtype` and `trainable` of the layer.

    **Masking** `padding_mask` (B, T), True where a token takes part. A masked token is no key; in
    performer-pytorch its value alone is zero, and it weighs as before.

    **Example**

    >>> block = keras_performer.convert.PerformerPytorchBlock(2, 4, 16, norm="scale", gated=True)
    >>> tuple(block(np.ones((1, 5, 8), "float32")).shape)
    (1, 5, 8)

    **Source** performer-pytorch 1.1.4.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        intermediate_dim: int,
        *,
        causal: bool = False,
        norm: str = "layer",
        gated: bool = False,
        shift_tokens: bool = False,
        rotary: bool = False,
        use_bias: bool = False,
        reversible: bool = False,
        feature_map: Any = "favor_plus",
        attention_dropout: float = 0.0,
        feedforward_dropout: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}. Received: norm={norm!r}")
        if isinstance(feature_map, keras.layers.Layer):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.intermediate_dim = intermediate_dim
        self.causal = causal
        self.norm = norm
        self.gated = gated
        self.shift_tokens = shift_tokens
        self.rotary = rotary
        self.use_bias = use_bias
        self.reversible = reversible
        self.feature_map = feature_map
        self.attention_dropout = attention_dropout
        self.feedforward_dropout = feedforward_dropout

    def build(self, inputs_shape: Any) -> None:
        """Create the sublayers for inputs (B, T, D), or (B, T, 2D) if reversible."""
        width = inputs_shape[-1] // 2 if self.reversible else inputs_shape[-1]
        shape = (*inputs_shape[:-1], width)
        self.attention = PerformerAttention(
            self.num_heads,
            self.key_dim,
            use_bias=self.use_bias,
            feature_map=self.feature_map,
            rotary_max_wavelength=10000 if self.rotary else None,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.attention.build(shape, shape)
        self.feedforward_intermediate = keras.layers.Dense(
            self.intermediate_dim * (2 if self.gated else 1),
            dtype=self.dtype_policy,
            name="feedforward_intermediate",
        )
        self.feedforward_intermediate.build(shape)
        self.feedforward_output = keras.layers.Dense(
            width, dtype=self.dtype_policy, name="feedforward_output"
        )
        self.feedforward_output.build((*inputs_shape[:-1], self.intermediate_dim))
        self.attention_norm = self._build_norm("attention", shape)
        self.feedforward_norm = self._build_norm("feedforward", shape)
        self.attention_dropout_layer = keras.layers.Dropout(
            self.attention_dropout, dtype=self.dtype_policy, name="attention_dropout"
        )
        self.feedforward_dropout_layer = keras.layers.Dropout(
            self.feedforward_dropout, dtype=self.dtype_policy, name="feedforward_dropout"
        )

    def _build_norm(self, branch: str, shape: Any) -> Any:
        """A layer, or the one number of the other kinds."""
        if self.norm != "layer":
            return self.add_weight(
                name=f"{branch}_scale",
                shape=(),
                initializer=keras.initializers.Constant(1e-3 if self.norm == "rezero" else 1.0),
            )
        norm = keras.layers.LayerNormalization(
            epsilon=_EPSILON, dtype=self.dtype_policy, name=f"{branch}_norm"
        )
        norm.build(shape)
        return norm

    def call(self, inputs: Any, padding_mask: Any = None, training: bool | None = None) -> Any:
        """Run the block; see the class."""
        mask = None if padding_mask is None else ops.cast(padding_mask, "bool")

        def attention(x: Any) -> Any:
            x = self.attention(
                x,
                x,
                key_mask=mask,
                use_causal_mask=self.causal,
                positions=ops.arange(ops.shape(x)[1], dtype="int32"),
            )
            return self.attention_dropout_layer(x, training=training)

        def feed_forward(x: Any) -> Any:
            x = self.feedforward_intermediate(x)
            x, gate = ops.split(x, 2, axis=-1) if self.gated else (x, None)
            x = keras.activations.gelu(x, approximate=False)
            x = x if gate is None else x * gate
            return self.feedforward_output(self.feedforward_dropout_layer(x, training=training))

        first, second = ops.split(inputs, 2, axis=-1) if self.reversible else (inputs, inputs)
        first = first + self._branch(second, attention, self.attention_norm, mask)
        second = second if self.reversible else first
        second = second + self._branch(first, feed_forward, self.feedforward_norm, mask)
        return ops.concatenate([first, second], axis=-1) if self.reversible else second

    def _branch(self, x: Any, function: Any, norm: Any, mask: Any) -> Any:
        if self.norm == "layer":
            x = norm(x)
        elif self.norm == "scale":
            length = ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
            x = x / ops.maximum(length, _EPSILON) * norm
        x = function(self._shift(x, mask) if self.shift_tokens else x)
        return x * norm if self.norm == "rezero" else x

    def _shift(self, x: Any, mask: Any) -> Any:
        """Move parts of the features to the token after, or before."""
        shifts = (0, 1) if self.causal else (-1, 0, 1)
        size = x.shape[-1] // len(shifts)
        # What does not divide stays with the last part, unshifted.
        parts = ops.split(x, [size * (i + 1) for i in range(len(shifts))], axis=-1)
        shifted = []
        for part, shift in zip(parts, (*shifts, 0), strict=True):
            if shift and mask is not None:
                part = ops.where(ops.expand_dims(mask, -1), part, 0.0)
            if shift:
                padding = ((0, 0), (1, 0) if shift > 0 else (0, 1), (0, 0))
                part = ops.pad(part, padding)
                part = part[:, :-1] if shift > 0 else part[:, 1:]
            shifted.append(part)
        return ops.concatenate(shifted, axis=-1)

    def compute_output_shape(self, inputs_shape: Any) -> Any:
        """Return the shape of the output, which is that of the input."""
        return inputs_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "intermediate_dim": self.intermediate_dim,
            "causal": self.causal,
            "norm": self.norm,
            "gated": self.gated,
            "shift_tokens": self.shift_tokens,
            "rotary": self.rotary,
            "use_bias": self.use_bias,
            "reversible": self.reversible,
            "feature_map": self.feature_map,
            "attention_dropout": self.attention_dropout,
            "feedforward_dropout": self.feedforward_dropout,
        }
