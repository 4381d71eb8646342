"""What several test files feed the package: arrays, and a function of one's own."""

import keras
import numpy as np


def normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype("float32")


def make_segments(length):
    """Ids of two rows, (2, T), in runs of unlike lengths."""
    ids = np.zeros((2, length), "int32")
    ids[0, length // 3 :] = 4
    ids[0, length // 2 :] = 0  # an id that comes back starts a segment of its own
    ids[1, length - length // 5 :] = 7
    return ids


@keras.saving.register_keras_serializable(package="keras_performer_tests")
def squared(x):
    return x * x
