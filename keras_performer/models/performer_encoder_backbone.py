"""The encoder model."""

import keras

from keras_performer.layers import PerformerEncoderBlock
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_backbone import PerformerStack


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerEncoderBackbone(PerformerStack):
    """An encoder of long token sequences: embedding, pre-norm Performer blocks, a last norm.

    Use it as the body of masked language models, classifiers and embedders. It is a functional
    Keras model and a keras-hub backbone: `from_preset`, `save_to_preset` and `enable_lora` work.

    **Shapes** Inputs: a dict of `token_ids` and `padding_mask`, both integers (B, T). Output:
    (B, T, D).

    **Args**
        vocabulary_size: Number of token ids.
        num_layers: Number of blocks.
        num_heads: Number of query heads N.
        hidden_dim: Model width D.
        intermediate_dim: Width of the feed-forward part of each block.
        key_dim: Head size H. Default: D/N.
        num_key_value_heads: Number of key/value heads K, a divisor of N. Default: N.
        attention: "performer", or as a baseline with the same other weights "softmax" (quadratic)
            or "sliding_window" (exact, but blind beyond the window).
        sliding_window: Window W of that last kind: tokens see |t - s| < W.
        num_features: Number of features M. Default: what the feature map chooses.
        feature_map: Name, config or instance of a feature map. Each block gets its own copy.
        exact_window: W, to weigh keys within a block of W tokens and its neighbours exactly and
            only the others through features; see `PerformerAttention`. The baselines ignore it.
        num_sink_tokens: Number of leading tokens that every query weighs exactly.
        far_bias: Start of a learned bias for each key head on what lies beyond the `exact_window`;
            see `PerformerAttention`.
        qk_norm: Whether queries and keys are normalised, with a learned temperature.
        position_embedding: `"rotary"`, which has no longest length (angles are rounded to 0.03 at
            a million tokens), or `"learned"`.
        max_sequence_length: Longest input with learned positions. Not for rotary positions.
        rotary_max_wavelength: Longest wavelength of the rotary positions.
        gated: Whether the feed-forward part is a gated linear unit.
        activation: Activation of the feed-forward part.
        dropout: Rate of dropout on the embedding and on the residual branches.
        attention_dropout: Rate at which attention drops whole keys.
        layer_norm_epsilon: Epsilon of the layer normalisations.
        use_bias: Whether the dense layers have biases.
        kernel_initializer: Initializer of the kernels of the blocks.
        tie_weights: Whether heads that predict tokens share the token embedding.
        remat: Whether each block keeps its input only, and computes the rest again in the backward
            pass: less memory, about a third more time.
        reversible: Whether the blocks run on two streams that the backward pass computes again, see
            `keras_performer.layers.ReversibleStack`. A model of its own: weights trained one way do
            not fit the other.
        seed: Seed of the random features and of dropout; each block derives its own from it.
        dtype: Dtype or dtype policy of every layer, such as `"mixed_bfloat16"`.
        **kwargs: `name` and `trainable` of the model.

    **Returns** (calling the model) the last hidden states, in the compute dtype.

    **Masking** `padding_mask` is 1 where a token takes part, 0 where it is padding: such a token is
    no key for anyone, so padding changes no other token's output. Its own output means nothing.

    **Precision** As `dtype` says; attention accumulates in float32.

    **Cost** num_layers times O(T M (H + V) N + T D intermediate_dim), linear in T.

    **Raises** ValueError for sizes that are not positive integers, heads that do not divide the
    width, an odd head size with rotary positions, an unknown `position_embedding`, or a
    `max_sequence_length` that is missing (learned) or without effect (rotary).

    **Example**

    >>> model = PerformerEncoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> ids = keras.ops.ones((2, 5), "int32")
    >>> tuple(model({"token_ids": ids, "padding_mask": ids}).shape)
    (2, 5, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, with pre-norm blocks, rotary positions
    and normalised queries and keys in place of the paper's.
    """

    block_class = PerformerEncoderBlock
