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
from rich.console import Console
from rich.table import Table

from keras_performer.models import PerformerCausalLM, PerformerDecoderBackbone

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
        for position in (early, late):
            seconds, size = measure(model, position, arguments.steps)
            results[kind][position] = {"seconds": seconds, "state_bytes": size}
            table.add_row(kind, f"{position:,}", f"{1e3 * seconds:.2f}", f"{size / 2**20:.2f}")
        ratios = [
            results[kind][late][what] / results[kind][early][what]
            for what in ("seconds", "state_bytes")
        ]
        results[kind]["ratios"] = ratios
        table.add_row(kind, "late / early", f"× {ratios[0]:.2f}", f"× {ratios[1]:.2f}")
    Console().print(table)
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


def measure(model: PerformerCausalLM, position: int, steps: int) -> tuple[float, int]:
    """Return the median seconds of one token after `position` tokens, and the bytes carried."""
    run = compiled(model)
    state = model.initial_state(1, position)
    rng = np.random.default_rng(0)
    if model.backbone.attention == "performer":
        for start in range(0, position, CHUNK):
            chunk = rng.integers(5, 261, (1, min(CHUNK, position - start))).astype("int32")
            _, state = run(chunk, state)
    # Softmax attention costs the same whatever its keys and values are.
    times = []
    for _ in range(steps + 2):  # The first two compile.
        token = rng.integers(5, 261, (1, 1)).astype("int32")
        begun = time.perf_counter()
        logits, state = run(token, state)
        keras.ops.convert_to_numpy(logits)
        times.append(time.perf_counter() - begun)
    size = sum(
        int(np.prod(tensor.shape)) * keras.ops.convert_to_numpy(tensor).itemsize
        for tensor in keras.tree.flatten(state)
    )
    return float(np.median(times[2:])), size


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
