"""The Transformer encoder block of the Performer models."""

from typing import Any

import keras

from keras_performer.layers._performer_block import PerformerBlock
from keras_performer.layers.performer_attention import merge_masks


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerEncoderBlock(PerformerBlock):
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
        attention: "performer", or as a baseline with the same other weights "softmax" (quadratic)
            or "sliding_window" (exact, but blind beyond the window).
        sliding_window: Window W of that last kind: tokens see |t - s| < W.
        num_features: Number of features M. Default: what the feature map chooses.
        feature_map: Name, config or instance of a feature map; an instance is copied by its config.
        exact_window: W, to weigh keys within a block of W tokens and its neighbours exactly and
            only the others through features; see `PerformerAttention`. The baselines ignore it.
        num_sink_tokens: Number of leading tokens that every query weighs exactly.
        far_bias: Start of a learned bias for each key head on what lies beyond the `exact_window`;
            see `PerformerAttention`.
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
        remat: Whether training keeps the input of the block only, and computes the rest again in
            the backward pass: less memory, about a third more time.
        seed: Seed of the random features and of dropout. Weights draw from `kernel_initializer`.
        **kwargs: `name`, `dtype` and `trainable` of the layer.

    **Returns** A tensor of the shape and compute dtype of `inputs`; with `return_state=True` a pair
    of it and the state after these tokens.

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

    causal = False

    def build(self, inputs_shape: tuple[int | None, ...]) -> None:
        """Create the sublayers for inputs (B, T, D)."""
        self._build_block(inputs_shape)

    def call(
        self,
        inputs: Any,
        padding_mask: Any = None,
        segment_ids: Any = None,
        positions: Any = None,
        initial_state: dict[str, Any] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> Any:
        """Encode `inputs`.

        **Args**
            inputs: (B, T, D).
            padding_mask: (B, T), True or not 0 where a token takes part.
            segment_ids: (B, T) integers; tokens attend within a run of equal ids.
            positions: (B, T) positions for the rotary rotation. Default: the distance from the
                row's first token that takes part.
            initial_state: Tokens before these, which every token sees too: a stream is encoded
                chunk by chunk, and a chunk sees itself and the chunks before it.
            return_state: Whether to return the state as well.
            training: Whether dropout is applied.

        **Returns** (B, T, D), or a pair of it and the state.
        """
        key_mask = merge_masks(inputs, padding_mask)
        inputs = keras.ops.cast(inputs, self.compute_dtype)

        def block(inputs: Any, initial_state: Any) -> Any:
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
            output = hidden + self.feed_forward(hidden, training)
            return (output, state) if return_state else output

        return self._run(block, training, inputs, initial_state)
