"""keras-hub's `TransformerEncoder` with attention at a linear cost."""

from typing import Any

import keras

from keras_performer.convert._transformer_block import TransformerBlock, key_mask


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerTransformerEncoder(TransformerBlock):
    """What `performerize` puts in the place of a `keras_hub.layers.TransformerEncoder`.

    The same sublayers, with the same names and weight shapes, in the same order of computation, but
    for the attention, which is a `PerformerAttention`. To build a new model take
    `keras_performer.layers.PerformerEncoderBlock`.

    **Shapes** `inputs` and the output (B, T, D); `padding_mask` (B, T).

    **Args** Those of `keras_hub.layers.TransformerEncoder`, and

        use_bias: Whether the dense layers and the attention have biases.
        attention: Arguments of `PerformerAttention` that keras-hub's layer does not have, such as
            `{"num_features": 256, "exact_window": 64}`.

    **Masking** `padding_mask`, or else the Keras mask of `inputs`, says which keys take part.
    `attention_mask` is a mask of keys only, see `PerformerAttention`, or (B, S) as ESM's encoder
    takes it.

    **Precision** Attention is computed in float32 under every policy.

    **Cost** As `PerformerEncoderBlock`.

    **Raises** ValueError for what `PerformerAttention` cannot honour.

    **Example**

    >>> layer = PerformerTransformerEncoder(16, 2, attention={"num_features": 32})
    >>> tuple(layer(np.ones((1, 5, 8), "float32")).shape)
    (1, 5, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, for the attention.
    """

    def build(self, inputs_shape: tuple[Any, ...]) -> None:
        """Create the sublayers for inputs (B, T, D)."""
        self.self_attention_layer = self._build_attention(
            "self_attention_layer", inputs_shape, inputs_shape, self.attention
        )
        self.self_attention_layer_norm, self.self_attention_dropout = self._build_ends(
            "self_attention", inputs_shape
        )
        self._build_feedforward(inputs_shape)

    def call(
        self,
        inputs: Any,
        padding_mask: Any = None,
        attention_mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        """Encode `inputs`; see the class."""
        mask = key_mask(inputs, padding_mask)
        if attention_mask is not None and len(attention_mask.shape) == 2:
            attention_mask = keras.ops.expand_dims(attention_mask, 1)

        def attend(x: Any) -> Any:
            return self.self_attention_layer(
                x, x, key_mask=mask, attention_mask=attention_mask, training=training
            )

        x = self._residual(
            inputs, attend, self.self_attention_layer_norm, self.self_attention_dropout, training
        )
        return self._feedforward(x, training)

    def compute_output_shape(self, inputs_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """The shape of the inputs."""
        return inputs_shape
