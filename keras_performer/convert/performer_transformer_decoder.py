"""keras-hub's `TransformerDecoder` with attention at a linear cost and a state of fixed size."""

from typing import Any

import keras

from keras_performer.convert._transformer_block import TransformerBlock, key_mask


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerTransformerDecoder(TransformerBlock):
    """What `performerize` puts in the place of a `keras_hub.layers.TransformerDecoder`.

    The same sublayers, with the same names and weight shapes, in the same order of computation, but
    for the attention, which is a `PerformerAttention`. Where keras-hub's layer takes and returns a
    cache of keys and values, this one takes and returns a state, whose size is fixed. To build a
    new model take `keras_performer.layers.PerformerDecoderBlock`.

    **Shapes** `decoder_sequence` and the output (B, T, D), `encoder_sequence` (B, S, D'); padding
    masks (B, T) and (B, S).

    **Args** As `PerformerTransformerEncoder`. Windows and sink tokens of `attention` are those of
    the self-attention: cross-attention has no near tokens, and is softmax attention where a
    `sliding_window` makes the self-attention that.

    **Call arguments** Those of `keras_hub.layers.TransformerDecoder` but for the caches; whether
    there is an `encoder_sequence` is settled by the first call. `initial_state`, from
    `initial_state()` or an earlier call, stands for the tokens before these; with `return_state`
    the result is a pair of the output and the state after them.

    **Masking** No token sees a later one, unless `use_causal_mask=False`. Padding masks, or else
    the Keras masks of the sequences, say which keys take part. `decoder_attention_mask` and
    `encoder_attention_mask` are masks of keys only, see `PerformerAttention`.

    **Precision** Attention is computed in float32 under every policy.

    **Cost** As `PerformerDecoderBlock`.

    **Raises** ValueError for what `PerformerAttention` cannot honour, and if `encoder_sequence` is
    there in one call and not in another.

    **Example**

    >>> layer = PerformerTransformerDecoder(16, 2, attention={"num_features": 32})
    >>> x = np.ones((1, 5, 8), "float32")
    >>> output, state = layer(x, return_state=True)
    >>> output, state = layer(x[:, :1], initial_state=state, return_state=True)
    >>> int(state["position"][0])
    6

    **Source** Choromanski et al. 2021, arXiv 2009.14794, for the attention.
    """

    def build(
        self,
        decoder_sequence_shape: tuple[Any, ...],
        encoder_sequence_shape: tuple[Any, ...] | None = None,
    ) -> None:
        """Create the sublayers, those of cross-attention only for a shape of encoder outputs."""
        self.self_attention = self._build_attention(
            "self_attention", decoder_sequence_shape, decoder_sequence_shape, self.attention
        )
        self.self_attention_layer_norm, self.self_attention_dropout = self._build_ends(
            "self_attention", decoder_sequence_shape
        )
        self.cross_attention = None
        if encoder_sequence_shape is not None:
            self.cross_attention = self._build_attention(
                "cross_attention",
                decoder_sequence_shape,
                encoder_sequence_shape,
                _without_positions(self.attention),
            )
            self.cross_attention_layer_norm, self.cross_attention_dropout = self._build_ends(
                "cross_attention", decoder_sequence_shape
            )
        self._build_feedforward(decoder_sequence_shape)

    def call(
        self,
        decoder_sequence: Any,
        encoder_sequence: Any = None,
        decoder_padding_mask: Any = None,
        decoder_attention_mask: Any = None,
        encoder_padding_mask: Any = None,
        encoder_attention_mask: Any = None,
        use_causal_mask: bool = True,
        initial_state: dict[str, Any] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> Any:
        """Decode `decoder_sequence`; see the class."""
        cross = self.cross_attention
        if (encoder_sequence is None) != (cross is None):
            raise ValueError(
                "The first call settles whether there is an encoder_sequence. Received: a call "
                f"{'without' if encoder_sequence is None else 'with'} one, of a layer that was "
                f"built {'without' if cross is None else 'with'} one."
            )
        mask = key_mask(decoder_sequence, decoder_padding_mask)
        states = []

        def attend(x: Any) -> Any:
            x = self.self_attention(
                x,
                x,
                key_mask=mask,
                attention_mask=decoder_attention_mask,
                use_causal_mask=use_causal_mask,
                initial_state=initial_state,
                return_state=return_state,
                training=training,
            )
            if return_state:
                x, state = x
                states.append(state)
            return x

        x = self._residual(
            decoder_sequence,
            attend,
            self.self_attention_layer_norm,
            self.self_attention_dropout,
            training,
        )
        if cross is not None:
            encoder_mask = key_mask(encoder_sequence, encoder_padding_mask)

            def attend_encoder(x: Any) -> Any:
                return cross(
                    x,
                    encoder_sequence,
                    key_mask=encoder_mask,
                    attention_mask=encoder_attention_mask,
                    training=training,
                )

            x = self._residual(
                x,
                attend_encoder,
                self.cross_attention_layer_norm,
                self.cross_attention_dropout,
                training,
            )
        x = self._feedforward(x, training)
        return (x, *states) if return_state else x

    def initial_state(self, batch_size: Any, max_length: int | None = None) -> dict[str, Any]:
        """The state before the first token; see `PerformerAttention.initial_state`."""
        return self.self_attention.initial_state(batch_size, max_length)

    def compute_output_shape(
        self,
        decoder_sequence_shape: tuple[Any, ...],
        encoder_sequence_shape: tuple[Any, ...] | None = None,
    ) -> tuple[Any, ...]:
        """The shape of the decoder's sequence."""
        del encoder_sequence_shape
        return decoder_sequence_shape


def _without_positions(attention: dict[str, Any]) -> dict[str, Any]:
    """The options of cross-attention, in which nothing is near."""
    near = ("exact_window", "num_sink_tokens", "far_bias", "sliding_window")
    options = {name: value for name, value in attention.items() if name not in near}
    if attention.get("sliding_window") is not None:
        options |= {"feature_map": None, "num_features": None}
    return options
