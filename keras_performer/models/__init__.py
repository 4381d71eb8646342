"""keras-hub backbones, tasks, preprocessors and tokenizers built on FAVOR+ attention."""

from keras_performer.models.byte_tokenizer import ByteTokenizer
from keras_performer.models.dna_tokenizer import DNATokenizer
from keras_performer.models.gene_expression_embedding import GeneExpressionEmbedding
from keras_performer.models.performer_byte_pair_tokenizer import PerformerBytePairTokenizer
from keras_performer.models.performer_causal_lm import PerformerCausalLM
from keras_performer.models.performer_causal_lm_preprocessor import PerformerCausalLMPreprocessor
from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.performer_masked_lm import PerformerMaskedLM
from keras_performer.models.performer_masked_lm_preprocessor import PerformerMaskedLMPreprocessor
from keras_performer.models.performer_seq_2_seq_backbone import PerformerSeq2SeqBackbone
from keras_performer.models.performer_seq_2_seq_lm import PerformerSeq2SeqLM
from keras_performer.models.performer_seq_2_seq_lm_preprocessor import (
    PerformerSeq2SeqLMPreprocessor,
)
from keras_performer.models.performer_sequence_classifier import PerformerSequenceClassifier
from keras_performer.models.performer_sequence_classifier_preprocessor import (
    PerformerSequenceClassifierPreprocessor,
)
from keras_performer.models.performer_token_classifier import PerformerTokenClassifier
from keras_performer.models.performer_token_classifier_preprocessor import (
    PerformerTokenClassifierPreprocessor,
)
from keras_performer.models.performer_word_piece_tokenizer import PerformerWordPieceTokenizer
from keras_performer.models.protein_tokenizer import ProteinTokenizer

__all__ = [
    "ByteTokenizer",
    "DNATokenizer",
    "GeneExpressionEmbedding",
    "PerformerBytePairTokenizer",
    "PerformerCausalLM",
    "PerformerCausalLMPreprocessor",
    "PerformerDecoderBackbone",
    "PerformerEncoderBackbone",
    "PerformerMaskedLM",
    "PerformerMaskedLMPreprocessor",
    "PerformerSeq2SeqBackbone",
    "PerformerSeq2SeqLM",
    "PerformerSeq2SeqLMPreprocessor",
    "PerformerSequenceClassifier",
    "PerformerSequenceClassifierPreprocessor",
    "PerformerTokenClassifier",
    "PerformerTokenClassifierPreprocessor",
    "PerformerWordPieceTokenizer",
    "ProteinTokenizer",
]
