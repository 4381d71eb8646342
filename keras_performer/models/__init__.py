"""keras-hub backbones, tasks, preprocessors and tokenizers built on FAVOR+ attention."""

from keras_performer.models.performer_causal_lm import PerformerCausalLM
from keras_performer.models.performer_causal_lm_preprocessor import PerformerCausalLMPreprocessor
from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.performer_masked_lm import PerformerMaskedLM
from keras_performer.models.performer_masked_lm_preprocessor import PerformerMaskedLMPreprocessor
from keras_performer.models.protein_tokenizer import ProteinTokenizer

__all__ = [
    "PerformerCausalLM",
    "PerformerCausalLMPreprocessor",
    "PerformerDecoderBackbone",
    "PerformerEncoderBackbone",
    "PerformerMaskedLM",
    "PerformerMaskedLMPreprocessor",
    "ProteinTokenizer",
]
