"""Pairs of strings to inputs and labels of the encoder-decoder language model."""

from typing import Any

import keras
import keras_hub

from keras_performer.models._load_preset import load_by_name
from keras_performer.models.performer_seq_2_seq_backbone import PerformerSeq2SeqBackbone
from keras_performer.models.protein_tokenizer import ProteinTokenizer


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerSeq2SeqLMPreprocessor(keras_hub.models.Seq2SeqLMPreprocessor):
    """Tokenize and pack pairs of strings, and make each next token of the second the label.

    keras-hub's `Seq2SeqLMPreprocessor` for the Performer encoder-decoder. It runs in TensorFlow,
    which must be installed beside any backend.

    **Shapes** B pairs give `encoder_token_ids` and `encoder_padding_mask` (B, S),
    `decoder_token_ids` and `decoder_padding_mask` (B, T), labels (B, T) and a sample weight (B, T).

    **Args**
        tokenizer: A tokenizer with start, end and padding tokens, for both sides.
        encoder_sequence_length: Length S. What is longer is cut at its end.
        decoder_sequence_length: Length T.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer on a dict of `encoder_text` and `decoder_text`)
    `(x, y, sample_weight)`; the sample weight is 1 where the label is a token.

    **Example**

    >>> preprocessor = PerformerSeq2SeqLMPreprocessor(
    ...     ProteinTokenizer(), encoder_sequence_length=6, decoder_sequence_length=4
    ... )
    >>> x, y, _ = preprocessor({"encoder_text": ["MKT"], "decoder_text": ["M"]})
    >>> [[int(i) for i in row] for row in y]
    [[15, 2, 0, 0]]

    **Source** Sutskever et al. 2014, arXiv 1409.3215, for the objective.
    """

    backbone_cls = PerformerSeq2SeqBackbone
    tokenizer_cls = ProteinTokenizer

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments; keras-hub's base class leaves out the lengths."""
        return {
            **super().get_config(),
            "encoder_sequence_length": self.encoder_sequence_length,
            "decoder_sequence_length": self.decoder_sequence_length,
        }
