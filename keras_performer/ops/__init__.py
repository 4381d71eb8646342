"""Pure functions on tensors, and the only place beside the exporter that knows a backend."""

from keras_performer.ops._scan import export_loops
from keras_performer.ops.favor_attention import favor_attention, favor_attention_weights
from keras_performer.ops.sliding_window_attention import (
    sliding_window_attention,
    sliding_window_weights,
)

__all__ = [
    "export_loops",
    "favor_attention",
    "favor_attention_weights",
    "sliding_window_attention",
    "sliding_window_weights",
]
