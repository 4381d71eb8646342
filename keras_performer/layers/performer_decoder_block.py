"""The Transformer decoder block of the Performer models."""

from typing import Any

import keras

from keras_performer.layers._performer_block import PerformerBlock
from keras_performer.layers.performer_attention import merge_masks


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerDecoderBlock(PerformerBlock):
    """A causal Transformer block whose attention costs linear time, with or without an encoder.

    With x the input, h = x + attention(norm(x)) where token t sees tokens up to t, then, if
    `cross_attention`, h = h + cross_attention(norm(h), encoder_outputs), and the output is
    h + feed_forward(norm(h)). Stack it to model sequences token by token; use it in functional
    Keras models like any layer.

    **Shapes** `inputs` (B, T, D); `padding_mask`, `segment_ids` and `positions` (B, T);
    `encoder_outputs` (B, S, D'), `encoder_padding_mask` (B, S); the output is (B, T, D).

    **Args** Those of `PerformerEncoderBlock`, and

        cross_attention: Whether the block also attends to the outputs of an encoder, without
            positions of its own. With attention="sliding_window" that part is softmax attention.

    **Returns** A tensor of the shape and compute dtype of `inputs`; with `return_state=True` a pair
    of it and the state after these tokens, which does not grow with their number (feature attention
    and sliding windows).

    **Masking** As in `PerformerEncoderBlock`, and no token sees a later one. A masked token of the
    encoder is no key for anyone.

    **Precision** Every sublayer has this layer's dtype policy; attention accumulates in float32.

    **Cost** O(T M (H + V) N) for attention, as much again and O(S M (H + V) N) for
    cross-attention, O(T D intermediate_dim) for the feed-forward part. One more token after a
    state costs the same whatever came before.

    **Raises** ValueError as `PerformerEncoderBlock` does, and if `encoder_outputs` are missing or
    not expected.

    **Example**

    >>> block = PerformerDecoderBlock(num_heads=2, intermediate_dim=32, num_features=16)
    >>> output, state = block(keras.ops.ones((1, 5, 8)), return_state=True)
    >>> output, state = block(keras.ops.ones((1, 1, 8)), initial_state=state, return_state=True)
    >>> tuple(output.shape), int(state["position"][0])
    ((1, 1, 8), 6)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, for the attention; the block is pre-norm
    (Xiong et al. 2020, arXiv 2002.04745), where the paper's models are post-norm.
    """

    causal = True

    def __init__(
        self, num_heads: int, intermediate_dim: int, *, cross_attention: bool = False, **kwargs: Any
    ):
        super().__init__(num_heads, intermediate_dim, **kwargs)
        self.cross_attention = cross_attention

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        encoder_outputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        """Create the sublayers for inputs (B, T, D) and encoder outputs (B, S, D')."""
        self.check_encoder(encoder_outputs_shape)
        self._build_block(inputs_shape)
        if self.cross_attention:
            self.cross_attention_norm = self._build_norm("cross_attention_norm", inputs_shape)
            self.encoder_attention = self._build_attention(
                "cross_attention", inputs_shape, encoder_outputs_shape or inputs_shape
            )
            self.cross_attention_dropout = self._build_dropout("cross_attention_dropout", 0)

    def call(
        self,
        inputs: Any,
        encoder_outputs: Any = None,
        padding_mask: Any = None,
        encoder_padding_mask: Any = None,
        segment_ids: Any = None,
        positions: Any = None,
        initial_state: dict[str, Any] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> Any:
        """Decode `inputs`.

        **Args**
            inputs: (B, T, D).
            encoder_outputs: (B, S, D') with `cross_attention`, or what `encoder_memory` made of
                them.
            padding_mask: (B, T), True or not 0 where a token takes part.
            encoder_padding_mask: (B, S), the same for the encoder's tokens; not with a memory.
            segment_ids: (B, T) integers; tokens attend within a run of equal ids.
            positions: (B, T) positions for the rotary rotation. Default: the distance from the
                row's first token that takes part.
            initial_state: The tokens before these: the sequence goes on after them.
            return_state: Whether to return the state as well.
            training: Whether dropout is applied.

        **Returns** (B, T, D), or a pair of it and the state.
        """
        self.check_encoder(encoder_outputs)
        key_mask = merge_masks(inputs, padding_mask)
        if self.cross_attention and not isinstance(encoder_outputs, dict):
            encoder_padding_mask = merge_masks(encoder_outputs, encoder_padding_mask)
        inputs = keras.ops.cast(inputs, self.compute_dtype)

        def block(inputs: Any, encoder_outputs: Any, initial_state: Any) -> Any:
            x, state = self.attend(
                inputs,
                key_mask=key_mask,
                segment_ids=segment_ids,
                positions=positions,
                initial_state=initial_state,
                return_state=return_state,
                training=training,
            )
            hidden = inputs + x
            if self.cross_attention:
                hidden = hidden + self.attend_encoder(
                    hidden, encoder_outputs, encoder_padding_mask, training
                )
            output = hidden + self.feed_forward(hidden, training)
            return (output, state) if return_state else output

        return self._run(block, training, inputs, encoder_outputs, initial_state)

    def attend_encoder(
        self,
        x: Any,
        encoder_outputs: Any,
        encoder_padding_mask: Any = None,
        training: bool | None = None,
    ) -> Any:
        """The branch of cross-attention, to outputs or a memory: what is added to the residual."""
        x = self.cross_attention_norm(x)
        if isinstance(encoder_outputs, dict):
            x = self.encoder_attention.read(x, encoder_outputs)
        else:
            x = self.encoder_attention(
                x, encoder_outputs, key_mask=encoder_padding_mask, training=training
            )
        return self.cross_attention_dropout(x, training=training)

    def encoder_memory(self, encoder_outputs: Any, encoder_padding_mask: Any = None) -> Any:
        """What `call` takes in place of `encoder_outputs`, made once for many calls."""
        return self.encoder_attention.memory(encoder_outputs, encoder_padding_mask)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "cross_attention": self.cross_attention}
