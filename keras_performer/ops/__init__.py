"""Pure functions on tensors, and the only place beside the exporter that knows a backend."""

from keras_performer.ops._scan import export_loops
from keras_performer.ops.favor_attention import (
    empty_favor_state,
    favor_attention,
    favor_attention_weights,
)
from keras_performer.ops.sharded_favor_attention import sharded_favor_attention
from keras_performer.ops.sliding_window_attention import sliding_window_attention
from keras_performer.ops.softmax_attention import (
    empty_softmax_state,
    softmax_attention,
    softmax_weights,
)

__all__ = [
    "empty_favor_state",
    "empty_softmax_state",
    "export_loops",
    "favor_attention",
    "favor_attention_weights",
    "sharded_favor_attention",
    "sliding_window_attention",
    "softmax_attention",
    "softmax_weights",
]
