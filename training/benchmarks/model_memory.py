"""Memory of a training step: by depth, and of a byte-level decoder on a long sequence.

Run `python -m training.benchmarks.model_memory` (`KERAS_BACKEND` chooses the backend; Linux only).
Every model has a process of its own, which ends itself above `LIMIT`. There are two figures: the
peak of the whole process, with the framework and what compiling took, and by how much a step, when
an equal one came before, rises above the memory held between steps: activations and gradients,
without parameters and optimizer state.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.table import Table

from keras_performer.models import PerformerCausalLM, PerformerDecoderBackbone
from training.command import make_console, write_json
from training.results import peak_bytes

LIMIT = 9 * 2**30
KINDS = ("plain", "remat", "reversible")
# The first keeps blocks that were freed from lying between others, which would count as used; the
# second keeps TensorFlow from holding on to what it freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "TF_ENABLE_ONEDNN_OPTS": "0"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write `metrics.json`, and return the figures."""
    parser = argparse.ArgumentParser(description="Peak memory of a training step.")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["remat", "reversible"])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 24], help="numbers of layers")
    parser.add_argument("--width", type=int, default=64, help="of the models of these depths")
    parser.add_argument("--length", type=int, default=16384, help="their tokens")
    parser.add_argument(
        "--long", type=int, default=32768, help="tokens of the model of 6 layers, 0 for none"
    )
    parser.add_argument("--long-width", type=int, default=512, help="its width")
    parser.add_argument("--out", type=Path, help="default: runs/model_memory/<backend>")
    arguments = parser.parse_args(argv)
    backend = keras.config.backend()

    cases = [(depth, arguments.width, arguments.length) for depth in arguments.depths]
    cases += [(6, arguments.long_width, arguments.long)] if arguments.long else []
    table = Table(title=f"A training step of a causal decoder, {backend}, batch 1, float32")
    for column in ("blocks", "layers", "width", "tokens", "process, GiB", "step, MiB", "seconds"):
        table.add_column(column, justify="right")
    results: dict[str, Any] = {"backend": backend, "steps": [], "growth": {}}
    for kind in arguments.kinds:
        found = []
        for case in cases:
            found.append({"kind": kind, **measure(kind, *case)})
            process, step = found[-1]["process_bytes"] / 2**30, found[-1]["step_bytes"] / 2**20
            cells = [f"{n:,}" for n in case] + [f"{process:.2f}", f"{step:,.0f}"]
            table.add_row(kind, *cells, f"{found[-1]['seconds']:.1f}")
        results["steps"] += found
        steps = [figures["step_bytes"] for figures in found[: len(arguments.depths)]]
        results["growth"][kind] = steps[-1] / steps[0]
        table.add_row(kind, "last / first depth", "", "", "", f"× {steps[-1] / steps[0]:.2f}")
    make_console().print(table)
    folder = arguments.out or Path("runs/model_memory") / backend
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", results)
    return results


def measure(kind: str, num_layers: int, width: int, length: int) -> dict[str, Any]:
    """Run `child` in a process of its own."""
    call = f"child({kind!r}, {num_layers}, {width}, {length})"
    result = subprocess.run(
        [sys.executable, "-c", f"from training.benchmarks.model_memory import child; {call}"],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"{call} failed: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def child(kind: str, num_layers: int, width: int, length: int) -> None:
    """Take steps of one model, and print the figures."""
    threading.Thread(target=end_above_limit, daemon=True).start()
    backbone = PerformerDecoderBackbone(
        vocabulary_size=261,
        num_layers=num_layers,
        num_heads=max(1, width // 64),
        hidden_dim=width,
        intermediate_dim=4 * width,
        num_features=64,
        exact_window=64,
        seed=0,
        remat=kind == "remat",
        reversible=kind == "reversible",
    )
    model = PerformerCausalLM(backbone)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    ids = np.random.default_rng(0).integers(5, 261, (1, length)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    model.train_on_batch(inputs, ids)
    process = peak_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, begun = peak_bytes(), time.perf_counter()
    model.train_on_batch(inputs, ids)
    figures = {
        "num_layers": num_layers,
        "width": width,
        "length": length,
        "process_bytes": process,
        "step_bytes": peak_bytes() - before,
        "seconds": time.perf_counter() - begun,
    }
    print(json.dumps(figures))


def end_above_limit() -> None:
    """End this process as soon as it has held more than `LIMIT`."""
    while peak_bytes() < LIMIT:
        time.sleep(0.1)
    print(f"more than {LIMIT / 2**30:.0f} GiB", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
