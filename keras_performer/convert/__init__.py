"""Trained models of others: softmax attention replaced by linear attention, weights kept."""

from keras_performer.convert.antibody_models import from_antiberty, from_sapiens
from keras_performer.convert.calibrate import calibrate
from keras_performer.convert.exact_bert_backbone import ExactBertBackbone
from keras_performer.convert.exact_bert_masked_lm import ExactBertMaskedLM
from keras_performer.convert.extend_positions import extend_positions
from keras_performer.convert.from_hugging_face import from_hugging_face
from keras_performer.convert.from_performer_pytorch import from_performer_pytorch
from keras_performer.convert.hub_models import (
    PerformerBertBackbone,
    PerformerDistilBertBackbone,
    PerformerESMBackbone,
    PerformerExactBertBackbone,
    PerformerExactBertMaskedLM,
    PerformerGPT2Backbone,
    PerformerGPT2CausalLM,
    PerformerRobertaBackbone,
    PerformerRobertaMaskedLM,
)
from keras_performer.convert.performer_pytorch_backbone import PerformerPytorchBackbone
from keras_performer.convert.performer_pytorch_block import PerformerPytorchBlock
from keras_performer.convert.performer_pytorch_lm import PerformerPytorchLM
from keras_performer.convert.performer_transformer_decoder import PerformerTransformerDecoder
from keras_performer.convert.performer_transformer_encoder import PerformerTransformerEncoder
from keras_performer.convert.performerize import conversion_report, performerize

__all__ = [
    "ExactBertBackbone",
    "ExactBertMaskedLM",
    "PerformerBertBackbone",
    "PerformerDistilBertBackbone",
    "PerformerESMBackbone",
    "PerformerExactBertBackbone",
    "PerformerExactBertMaskedLM",
    "PerformerGPT2Backbone",
    "PerformerGPT2CausalLM",
    "PerformerPytorchBackbone",
    "PerformerPytorchBlock",
    "PerformerPytorchLM",
    "PerformerRobertaBackbone",
    "PerformerRobertaMaskedLM",
    "PerformerTransformerDecoder",
    "PerformerTransformerEncoder",
    "calibrate",
    "conversion_report",
    "extend_positions",
    "from_antiberty",
    "from_hugging_face",
    "from_performer_pytorch",
    "from_sapiens",
    "performerize",
]
