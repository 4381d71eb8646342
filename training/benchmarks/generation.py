"""Time and memory of one generated token, early and late in a sequence.

Run `python -m training.benchmarks.generation` (`KERAS_BACKEND` chooses the backend). A model reads
tokens up to each position and then takes single steps; the Performer carries a state of fixed size,
softmax attention all keys and values up to the position.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from rich.table import Table

from keras_performer.models import PerformerCausalLM, PerformerDecoderBackbone
from training.command import make_console

CHUNK = 1000
KINDS = ("performer", "softmax")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return its figures by kind and position."""
    parser = argparse.ArgumentParser(description="Cost of a generated token by its position.")
    parser.add_argument("--positions", type=int, nargs=2, default=[1000, 64000], metavar="N")
    parser.add_argument("--steps", type=int, default=50, help="single steps to take the median of")
    parser.add_argument("--hidden-dim", type=int, default=256, help="width of the model")
    parser.add_argument("--num-layers", type=int, default=4, help="number of blocks")
    arguments = parser.parse_args(argv)
    early, late = sorted(arguments.positions)

    table = Table(title=f"One token on {keras.config.backend()}, batch 1, float32")
    for column in ("attention", "position", "milliseconds", "state, MiB"):
        table.add_column(column, justify="right")
    results: dict[str, Any] = {}
    for kind in KINDS:
        model = make_model(kind, arguments.hidden_dim, arguments.num_layers)
        results[kind] = {}
        found = measure(model, (early, late), arguments.steps)
        for position, (seconds, size) in zip((early, late), found, strict=True):
            results[kind][position] = {"seconds": seconds, "state_bytes": size}
            table.add_row(kind, f"{position:,}", f"{1e3 * seconds:.2f}", f"{size / 2**20:.2f}")
        ratios = [
            results[kind][late][what] / results[kind][early][what]
            for what in ("seconds", "state_bytes")
        ]
        results[kind]["ratios"] = ratios
        table.add_row(kind, "late / early", f"× {ratios[0]:.2f}", f"× {ratios[1]:.2f}")
    make_console().print(table)
    return results


def make_model(kind: str, hidden_dim: int, num_layers: int) -> PerformerCausalLM:
    """Return an untrained decoder with 64-dimensional heads."""
    backbone = PerformerDecoderBackbone(
        vocabulary_size=261,
        num_layers=num_layers,
        num_heads=max(1, hidden_dim // 64),
        hidden_dim=hidden_dim,
        intermediate_dim=4 * hidden_dim,
        attention=kind,
        seed=0,
    )
    return PerformerCausalLM(backbone)


def measure(
    model: PerformerCausalLM, positions: Sequence[int], steps: int
) -> list[tuple[float, int]]:
    """Return for each position the median seconds of one token after it, and the bytes carried.

    Positions take turns, so that whatever else the machine does meets all of them alike.
    """
    run = compiled(model)
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(5, 261, (1, count)).astype("int32")

    states = [model.initial_state(1, position) for position in positions]
    if model.backbone.attention == "performer":
        for i, position in enumerate(positions):
            for start in range(0, position, CHUNK):
                _, states[i] = run(tokens(min(CHUNK, position - start)), states[i])
    # Softmax attention costs the same whatever its keys and values are.
    times: list[list[float]] = [[] for _ in positions]
    for _ in range(steps + 2):  # The first two compile.
        for i in range(len(positions)):
            token = tokens(1)
            begun = time.perf_counter()
            logits, states[i] = run(token, states[i])
            keras.ops.convert_to_numpy(logits)
            times[i].append(time.perf_counter() - begun)
    return [
        (float(np.median(seconds[2:])), state_bytes(state))
        for seconds, state in zip(times, states, strict=True)
    ]


def state_bytes(state: Any) -> int:
    """Return the bytes of all tensors of a state."""
    return sum(
        int(np.prod(tensor.shape)) * keras.ops.convert_to_numpy(tensor).itemsize
        for tensor in keras.tree.flatten(state)
    )


def compiled(model: PerformerCausalLM) -> Any:
    """Return `call_with_state` on token ids, compiled where the backend compiles."""

    def run(token_ids: Any, state: Any) -> tuple[Any, Any]:
        inputs = {"token_ids": token_ids, "padding_mask": keras.ops.ones_like(token_ids)}
        logits, _, state = model.call_with_state(inputs, state)
        return logits, state

    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(run)
    if backend == "jax":
        import jax

        return jax.jit(run)
    import torch

    return torch.no_grad()(run)


if __name__ == "__main__":
    main()
