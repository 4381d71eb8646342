"""The decoder model."""

import keras

from keras_performer.layers import PerformerDecoderBlock
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_backbone import PerformerStack


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerDecoderBackbone(PerformerStack):
    """A causal model of long token sequences: embedding, pre-norm decoder blocks, a last norm.

    Use it as the body of generative language models. Token t sees tokens up to t. It is a
    functional Keras model and a keras-hub backbone; `initial_state` and `call_with_state` run it
    over a stream, token by token or in chunks, in constant memory.

    **Shapes** Inputs: a dict of `token_ids` and `padding_mask`, both integers (B, T). Output:
    (B, T, D).

    **Args** Those of `PerformerEncoderBackbone`.

    **Returns** (calling the model) the last hidden states, in the compute dtype.

    **Masking** `padding_mask` is 1 where a token takes part, 0 where it is padding: such a token is
    no key for anyone, and no token sees a later one.

    **Precision** As `dtype` says; attention accumulates in float32.

    **Cost** num_layers times O(T M (H + V) N + T D intermediate_dim), linear in T.

    **Raises** ValueError as `PerformerEncoderBackbone` does.

    **Example**

    >>> model = PerformerDecoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> ids = keras.ops.ones((2, 5), "int32")
    >>> tuple(model({"token_ids": ids, "padding_mask": ids}).shape)
    (2, 5, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, with pre-norm blocks, rotary positions
    and normalised queries and keys in place of the paper's.
    """

    block_class = PerformerDecoderBlock
