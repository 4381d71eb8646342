"""Keras callbacks: what Performer models need while they train. Needs keras and numpy only."""

from keras_performer.callbacks._health import layer_health
from keras_performer.callbacks.attention_health import AttentionHealth
from keras_performer.callbacks.redraw_features import RedrawFeatures

__all__ = ["AttentionHealth", "RedrawFeatures", "layer_health"]
