"""Keras layers: attention and what is built of it. Needs keras and numpy only."""

from keras_performer.layers._recording import record_attention
from keras_performer.layers.performer_attention import (
    PerformerAttention,
    attention_layers,
)
from keras_performer.layers.performer_decoder_block import PerformerDecoderBlock
from keras_performer.layers.performer_encoder_block import PerformerEncoderBlock
from keras_performer.layers.reversible_stack import ReversibleStack

__all__ = [
    "PerformerAttention",
    "PerformerDecoderBlock",
    "PerformerEncoderBlock",
    "ReversibleStack",
    "attention_layers",
    "record_attention",
]
