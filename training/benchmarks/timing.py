"""What the speed benchmarks share: interleaved timings, machine rates, a model of nothing else."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np


class Workload(keras.layers.Layer):
    """Runs a function on queries, keys and values that are its weights, and returns their sum.

    As a model of its own it is timed through Keras: `predict_on_batch` is a forward pass, and
    `train_on_batch` a forward and a backward pass to all three, compiled as Keras compiles.
    """

    def __init__(self, function: Callable[..., Any], shape: tuple[int, ...]):
        super().__init__()
        self.function = function
        self.tensors = [
            self.add_weight(
                name=name,
                shape=shape,
                initializer=keras.initializers.RandomNormal(stddev=0.4, seed=seed),
            )
            for seed, name in enumerate(("query", "key", "value"))
        ]

    def call(self, x: Any) -> Any:
        """Scale the sum of the function's outputs by x (1, 1)."""
        output = self.function(*(keras.ops.convert_to_tensor(tensor) for tensor in self.tensors))
        return keras.ops.sum(output) * x


def make_workload(function: Callable[..., Any], shape: tuple[int, ...]) -> keras.Model:
    """Return a compiled model of one `Workload`, whose training step changes nothing."""
    inputs = keras.Input((1,))
    model = keras.Model(inputs, Workload(function, shape)(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model


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


def machine_rates(rounds: int = 5) -> tuple[float, float]:
    """Return multiply-adds and exponentials a second, in float32, as this backend does them."""
    size, count = 1024, 2**22
    rng = np.random.default_rng(0)
    matrix = keras.ops.convert_to_tensor(rng.standard_normal((size, size)).astype("float32"))
    numbers = keras.ops.convert_to_tensor(rng.standard_normal(count).astype("float32"))

    def waited(function: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: np.asarray(keras.ops.convert_to_numpy(function()))[0]

    seconds = interleaved(
        {
            "product": waited(lambda: keras.ops.matmul(matrix, matrix)[:1]),
            "exponential": waited(lambda: keras.ops.exp(numbers)[:1]),
        },
        rounds,
    )
    return size**3 / seconds["product"], count / seconds["exponential"]
