"""Time and memory of attention over length, against softmax attention and the identity.

Run `python -m training.benchmarks.attention_speed` (`KERAS_BACKEND` chooses the backend). Every
ratio compares runs that took turns in one process. Outputs are checked before anything is timed.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import matplotlib
import numpy as np
from keras import ops
from rich.table import Table

from keras_performer.feature_maps import FavorPlus
from keras_performer.ops import favor_attention
from training.command import make_console, start_keras
from training.results import machine, peak_bytes
from training.timing import interleaved

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HEADS, HEAD_DIM, CHUNK = 8, 64, 64  # the last: tokens whose pairs are formed
PARTS = ("forward", "forward_backward")
Function = Callable[..., Any]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, measure, print, write `metrics.json` and `speed.png`, and return the figures."""
    parser = argparse.ArgumentParser(description="Time and memory of attention over length.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--bidirectional", action="store_true", help="default: causal")
    parser.add_argument("--rounds", type=int, default=5, help="timings to take the median of")
    parser.add_argument("--memory", action="store_true", help="peak memory, in child processes")
    parser.add_argument("--out", type=Path, help="default: runs/attention_speed/<backend>")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    causal = not arguments.bidirectional
    if arguments.peak_of:
        name, length = arguments.peak_of
        print(peak_memory(methods(causal)[name], int(length)))
        return {}
    start_keras(None, seed=0)
    folder = arguments.out or Path("runs/attention_speed") / keras.config.backend()
    folder.mkdir(parents=True, exist_ok=True)
    check(causal)

    results: dict[str, Any] = {
        "backend": keras.config.backend(),
        "machine": machine(),
        "causal": causal,
        "seconds": {part: {} for part in PARTS},
    }
    console = make_console()
    for length in sorted(arguments.lengths):
        measured = measure(methods(causal), length, arguments.rounds)
        for part in PARTS:
            results["seconds"][part][length] = measured[part]
        console.print(table(length, measured, causal))
    results["tokens"] = decode(arguments.rounds, max(arguments.lengths))
    for name, seconds in results["tokens"].items():
        console.print(f"one token after {max(arguments.lengths):,}, {name}: {1e3 * seconds:.2f} ms")
    if causal:
        results["roofline"] = roofline(max(arguments.lengths), results)
        console.print(
            "forward with 256 features takes {ratio:.1f} times what its products and exponentials "
            "would ({gemm:.0f} GFLOP/s, {exp:.2f} G exponentials/s)".format(**results["roofline"])
        )
    if arguments.memory:
        results["peak_bytes"] = {}
        for name in methods(causal):
            command = [sys.executable, "-m", __spec__.name if __spec__ else "", "--peak-of", name]
            command += [str(max(arguments.lengths))]
            command += [] if causal else ["--bidirectional"]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results["peak_bytes"][name] = int(lines.split()[-1])
            mebibytes = results["peak_bytes"][name] / 2**20
            console.print(f"peak memory of forward and backward, {name}: {mebibytes:,.0f} MiB")
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, folder / "speed.png")
    return results


def methods(causal: bool) -> dict[str, Function]:
    """The functions of query, key and value (1, T, N, H) that are compared."""

    def features(count: int, exact_window: int | None = None) -> Function:
        feature_map = FavorPlus(count, seed=1)
        feature_map.build((None, None, HEADS, HEAD_DIM))
        return lambda q, k, v: favor_attention(
            q, k, v, feature_map, causal=causal, exact_window=exact_window
        )

    found = {
        "softmax": lambda q, k, v: ops.dot_product_attention(q, k, v, is_causal=causal),
        "256 features": features(256),
        "64 features": features(64),
        "64 features, window 64": features(64, exact_window=64),
        "identity": lambda q, k, v: v,
    }
    if keras.config.backend() == "torch" and importlib.util.find_spec("performer_pytorch"):
        from performer_pytorch import FastAttention

        peer = FastAttention(dim_heads=HEAD_DIM, nb_features=256, causal=causal)

        def run(q: Any, k: Any, v: Any) -> Any:
            return peer(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        found["performer-pytorch, 256"] = run
    return found


def check(causal: bool) -> None:
    """Raise an AssertionError unless the timed functions give what they should, on short input."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 300, HEADS, HEAD_DIM)).astype("float32") for _ in range(3))
    q, k = 0.4 * q, 0.4 * k
    feature_map = FavorPlus(64, seed=1)
    for window in (None, 64):
        options: dict[str, Any] = {"causal": causal, "exact_window": window}
        fast, truth = (
            ops.convert_to_numpy(
                favor_attention(q, k, v, feature_map, implementation=name, **options)
            )
            for name in ("auto", "reference")
        )
        np.testing.assert_allclose(fast, truth, rtol=1e-4, atol=1e-5)
    exact = favor_attention(q, k, v, feature_map, causal=causal, exact_window=300)
    softmax = ops.dot_product_attention(*map(ops.convert_to_tensor, (q, k, v)), is_causal=causal)
    exact, softmax = ops.convert_to_numpy(exact), ops.convert_to_numpy(softmax)
    np.testing.assert_allclose(exact, softmax, rtol=1e-4, atol=1e-5)


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


def measure(functions: dict[str, Function], length: int, rounds: int) -> dict[str, Any]:
    """Median seconds by part and method."""
    models = {
        name: make_workload(function, (1, length, HEADS, HEAD_DIM))
        for name, function in functions.items()
    }
    one = np.ones((1, 1), "float32")
    return {
        "forward": interleaved(
            {n: lambda m=m: m.predict_on_batch(one) for n, m in models.items()}, rounds
        ),
        "forward_backward": interleaved(
            {n: lambda m=m: m.train_on_batch(one, one) for n, m in models.items()}, rounds
        ),
    }


def decode(rounds: int, position: int) -> dict[str, float]:
    """Median seconds of one more token after `position` tokens, of attention alone."""
    rng = np.random.default_rng(0)

    def draw(length: int) -> Any:
        x = 0.4 * rng.standard_normal((1, length, HEADS, HEAD_DIM))
        return ops.convert_to_tensor(x.astype("float32"))

    feature_map = FavorPlus(256, seed=1)
    keys, values = draw(position), draw(position)
    query, key, value = (draw(1) for _ in range(3))
    _, state = favor_attention(keys, keys, values, feature_map, causal=True, return_state=True)

    def step() -> Any:
        output, _ = favor_attention(
            query, key, value, feature_map, causal=True, initial_state=state, return_state=True
        )
        return ops.convert_to_numpy(output)

    def softmax() -> Any:
        return ops.convert_to_numpy(ops.dot_product_attention(query, keys, values))

    return interleaved({"256 features": step, "softmax": softmax}, 4 * rounds)


def machine_rates() -> tuple[float, float]:
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
        5,
    )
    return size**3 / seconds["product"], count / seconds["exponential"]


def roofline(length: int, results: dict[str, Any]) -> dict[str, float]:
    """How far the causal forward pass is from the time of its products and exponentials alone."""
    products, exponentials = machine_rates()
    features = 256
    a_token = 2 * features * HEAD_DIM + CHUNK * (features + HEAD_DIM) + 2 * features * HEAD_DIM
    tokens = length * HEADS
    least = tokens * (a_token / products + (2 * features + CHUNK) / exponentials)
    seconds = results["seconds"]["forward"][length]["256 features"]
    return {
        "ratio": seconds / least,
        "gemm": 2e-9 * products,
        "exp": 1e-9 * exponentials,
    }


def peak_memory(function: Function, length: int) -> int:
    """Bytes by which a forward and backward pass raises the peak of this process (Linux only)."""
    one = np.ones((1, 1), "float32")
    make_workload(function, (1, CHUNK, HEADS, HEAD_DIM)).train_on_batch(one, one)
    model = make_workload(function, (1, length, HEADS, HEAD_DIM))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_bytes()
    model.train_on_batch(one, one)
    return peak_bytes() - before


def table(length: int, measured: dict[str, Any], causal: bool) -> Table:
    """Milliseconds, and how many times as fast as softmax attention."""
    kind = "causal" if causal else "bidirectional"
    found = Table(title=f"T = {length:,}, {kind}, {keras.config.backend()}, float32")
    for column in ("attention", "forward", "faster", "forward + backward", "faster"):
        found.add_column(column, justify="right")
    for name in measured["forward"]:
        cells = [name]
        for part in PARTS:
            seconds, softmax = measured[part][name], measured[part]["softmax"]
            cells += [f"{1e3 * seconds:.1f} ms", f"× {softmax / seconds:.2f}"]
        found.add_row(*cells)
    return found


def plot(results: dict[str, Any], path: Path) -> None:
    """Seconds over length, log-log."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, part in zip(axes, PARTS, strict=True):
        by_length = results["seconds"][part]
        for name in next(iter(by_length.values())):
            axis.loglog(list(by_length), [by_length[n][name] for n in by_length], "o-", label=name)
        axis.set(title=part.replace("_", " + "), xlabel="tokens", ylabel="seconds")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{results['backend']}, {results['machine']}, 8 heads of 64, float32")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    main()
