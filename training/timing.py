"""What measurements of speed share: a training step on random tokens, and runs that take turns."""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

VOCABULARY = 30


def token_model(backbone: Any, optimizer: Any) -> "keras.Model":
    """Return a compiled model that predicts its own tokens."""
    import keras

    model = keras.Model(backbone.input, backbone.token_embedding(backbone.output, reverse=True))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def token_step(model: "keras.Model", length: int) -> None:
    """Train a `token_model` on one sequence."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, length)).astype("int32")
    model.train_on_batch({"token_ids": ids, "padding_mask": np.ones_like(ids)}, ids)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each run; they take turns, so a slow moment meets them all.

    A first round, which compiles, is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found[1:]) for name, found in times.items()}
