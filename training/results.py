"""What recipes share around training: say what a run is, predict, check a reloaded model, end."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.command import write_json

# Beyond this, a reloaded model is not the model that was trained.
RELOAD_TOLERANCE = 1e-5


def run_table(title: str, rows: dict[str, str], output: Path) -> Table:
    """Return a table of what a run is going to do, with its backend and its folder at the end."""
    import keras

    rows = {
        **rows,
        "backend": f"keras {keras.version()} on {keras.config.backend()}",
        "output": f"{output}" + (" (resumes a run)" if (output / "backup").is_dir() else ""),
    }
    table = Table(title=title, show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def logits_of(model: Any, x: Any) -> np.ndarray:
    """Return the logits of a task for one batch of prepared inputs, not compiled, as float32."""
    import keras

    logits = model(x, training=False)
    return np.asarray(keras.ops.convert_to_numpy(logits), "float32")


def predict_in_batches(
    trainer: Any,
    lengths: Sequence[int] | np.ndarray,
    make_inputs: Callable[[np.ndarray], Any],
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Walk over all examples, from the shortest to the longest.

    **Args**
        trainer: A Keras model.
        lengths: Length of each example.
        make_inputs: Function of the indices of examples that returns the model's inputs.
        batch_size: Examples in a batch, also in the last, which repeats one: each new shape would
            be compiled anew.

    **Returns** (yields) indices (B,) and outputs (B, ...) as float32.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        filled = np.pad(indices, (0, batch_size - len(indices)), mode="edge")
        outputs = np.asarray(trainer.predict_on_batch(make_inputs(filled)), "float32")
        yield indices, outputs[: len(indices)]


def difference(what: str, expected: np.ndarray, received: np.ndarray, tolerance: float) -> float:
    """Return the largest absolute difference, or raise RuntimeError if it exceeds `tolerance`.

    **Example**

    >>> difference("the reloaded preset", np.zeros(2), np.array([0.0, 0.5]), tolerance=1.0)
    0.5
    """
    largest = float(np.abs(expected - received).max())
    if not largest <= tolerance:
        raise RuntimeError(
            f"The outputs of {what} differ from the trained model's by {largest:.2e}, more than "
            f"{tolerance:.0e}."
        )
    return largest


def reload_difference(trainer: Any, task: Any, x: Any) -> float:
    """Return the largest difference of the logits of a trainer and a reloaded task.

    **Args**
        trainer: The plain Keras model that was trained.
        task: What its preset was loaded as.
        x: Token ids and masks of a batch.

    **Raises** RuntimeError if it exceeds `RELOAD_TOLERANCE`.
    """
    import keras

    # The task itself takes strings.
    reloaded = keras.Model(task.input, task.output)
    expected, received = (
        np.asarray(model.predict_on_batch(x), "float32") for model in (trainer, reloaded)
    )
    return difference("the reloaded preset", expected, received, RELOAD_TOLERANCE)


def run_facts(config: Any, source: str, seconds: float, **counts: int) -> dict[str, Any]:
    """Return what identifies the run.

    **Args**
        config: The config of the run, a dataclass.
        source: A phrase that names the data.
        seconds: What it took.
        **counts: How many examples there are of each kind.
    """
    import keras

    return {
        "seconds": seconds,
        "backend": keras.config.backend(),
        "keras": keras.version(),
        "source": source,
        **counts,
        "config": dataclasses.asdict(config),
    }


def peak_bytes() -> int:
    """Return the most main memory that this process has held, as Linux tells it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def finish(output: Path, metrics: dict[str, Any], console: Console) -> None:
    """Write the figures, and only then give up the backup, from which the run could go on."""
    write_json(output / "metrics.json", metrics)
    shutil.rmtree(output / "backup", ignore_errors=True)
    console.print(f"Finished in {metrics['seconds']:.0f} s. Figures: {output / 'metrics.json'}")
