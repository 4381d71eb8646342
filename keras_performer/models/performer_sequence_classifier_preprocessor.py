"""Strings to inputs of the sequence classifier."""

from typing import Any

import keras
import keras_hub

from keras_performer.layers._arguments import packed_length
from keras_performer.models._load_preset import load_by_name
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.protein_tokenizer import ProteinTokenizer


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerSequenceClassifierPreprocessor(keras_hub.models.TextClassifierPreprocessor):
    """Tokenize strings and pack them to one length; labels and weights pass through.

    keras-hub's `TextClassifierPreprocessor` without segment ids. A tuple of batches is packed as
    `<start> first <end> second <end>`; inside `tf.data` this needs `tensorflow-text`.

    **Shapes** B strings give `token_ids` and `padding_mask` (B, T); one string gives vectors.

    **Args**
        tokenizer: A tokenizer with start, end and padding tokens.
        sequence_length: Length T, start and end token included. What is longer is cut at its end.
        truncate: How segments share the length: "round_robin" or "waterfall" (the first segment
            first).
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) `x`, `(x, y)` or `(x, y, sample_weight)`, as it was given.

    **Masking** `padding_mask` is False at padding tokens.

    **Raises** ValueError for a length that leaves no room for a token.

    **Example**

    >>> preprocessor = PerformerSequenceClassifierPreprocessor(
    ...     ProteinTokenizer(), sequence_length=6
    ... )
    >>> x, y = preprocessor(["MKT"], [1])
    >>> sorted(x), np.asarray(x["token_ids"]).tolist(), y
    (['padding_mask', 'token_ids'], [[1, 15, 13, 21, 2, 0]], [1])

    **Source** Devlin et al. 2019, arXiv 1810.04805, for how segments are packed.
    """

    backbone_cls = PerformerEncoderBackbone
    tokenizer_cls = ProteinTokenizer

    def __init__(
        self,
        tokenizer: Any,
        sequence_length: int = 512,
        truncate: str = "round_robin",
        **kwargs: Any,
    ):
        packed_length(sequence_length)
        super().__init__(tokenizer, sequence_length=sequence_length, truncate=truncate, **kwargs)

    def call(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Tokenize and pack strings.

        **Args**
            x: A string, a batch of strings, or a tuple of several such segments.
            y: Labels, or None.
            sample_weight: Weights, or None.

        **Returns** `x`, `(x, y)` or `(x, y, sample_weight)`.
        """
        packed = super().call(x, y=y, sample_weight=sample_weight)
        inputs, y, sample_weight = keras.utils.unpack_x_y_sample_weight(packed)
        inputs = {name: inputs[name] for name in ("token_ids", "padding_mask")}
        return keras.utils.pack_x_y_sample_weight(inputs, y, sample_weight)
