"""Byte-pair encoding with the special tokens of our models."""

from typing import Any

import keras
import keras_hub

from keras_performer.models._load_preset import load_by_name
from keras_performer.models._string_tokenizer import add_special_tokens
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerBytePairTokenizer(keras_hub.tokenizers.BytePairTokenizer):
    """keras-hub's `BytePairTokenizer`, with the tokens that packing and masking need.

    **Args**
        vocabulary: A dict from tokens to ids, or the path of such a JSON file. It holds `<pad>`,
            `<cls>`, `<eos>`, `<mask>` and `<unk>`.
        merges: A list of merges, or the path of a text file with one a line.
        **kwargs: As keras-hub's class.

    **Returns** (calling the layer) token ids.

    **Example**

    >>> tokens = ["<pad>", "<cls>", "<eos>", "<mask>", "<unk>", "a", "b", "ab"]
    >>> tokenizer = PerformerBytePairTokenizer(
    ...     {token: i for i, token in enumerate(tokens)}, ["a b"]
    ... )
    >>> [int(i) for i in tokenizer("abb")]
    [7, 6]

    **Source** Sennrich et al. 2016, arXiv 1508.07909.
    """

    backbone_cls = PerformerEncoderBackbone

    def __init__(self, vocabulary: Any = None, merges: Any = None, **kwargs: Any):
        add_special_tokens(self)
        super().__init__(vocabulary=vocabulary, merges=merges, **kwargs)
        self.built = True  # as `StringTokenizer`
