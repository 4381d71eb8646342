"""WordPiece with the special tokens of our models."""

from typing import Any

import keras
import keras_hub

from keras_performer.models._load_preset import load_by_name
from keras_performer.models._string_tokenizer import add_special_tokens
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerWordPieceTokenizer(keras_hub.tokenizers.WordPieceTokenizer):
    """keras-hub's `WordPieceTokenizer`, with the tokens that packing and masking need.

    **Args**
        vocabulary: A list of tokens, or the path of a text file with one a line. It holds `<pad>`,
            `<cls>`, `<eos>`, `<mask>` and `<unk>`.
        lowercase: Whether text is lower-cased.
        **kwargs: As keras-hub's class.

    **Returns** (calling the layer) token ids.

    **Example**

    >>> tokens = ["<pad>", "<cls>", "<eos>", "<mask>", "<unk>", "per", "##former"]
    >>> [int(i) for i in PerformerWordPieceTokenizer(tokens)("performer other")]
    [5, 6, 4]

    **Source** Schuster and Nakajima 2012; Devlin et al. 2019, arXiv 1810.04805.
    """

    backbone_cls = PerformerEncoderBackbone

    def __init__(self, vocabulary: Any = None, lowercase: bool = False, **kwargs: Any):
        add_special_tokens(self)
        super().__init__(
            vocabulary=vocabulary, lowercase=lowercase, **{"oov_token": "<unk>", **kwargs}
        )
        self.built = True  # as `StringTokenizer`
