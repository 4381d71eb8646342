"""What recipes share around training: say what a run is, choose, predict, save and check, end."""

import dataclasses
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.command import write_json

# Beyond these, a reloaded or an exported model is not the model that was trained.
RELOAD_TOLERANCE = 1e-5
EXPORT_TOLERANCE = 1e-3


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


def spread(count: int, wanted: int) -> np.ndarray:
    """Return the indices of some of many examples, from all over them: they may be sorted.

    **Args**
        count: How many there are.
        wanted: The most that are taken; 0 takes all.

    **Example**

    >>> spread(9, 3).tolist(), spread(2, 3).tolist(), spread(2, 0).tolist()
    ([0, 4, 8], [0, 1], [0, 1])
    """
    return np.linspace(0, count - 1, min(wanted or count, count)).astype(int)


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


def difference(expected: np.ndarray, received: np.ndarray) -> float:
    """Return the largest absolute difference; `finish` refuses what is too large.

    **Example**

    >>> difference(np.zeros(2), np.array([0.0, 0.5]))
    0.5
    """
    return float(np.abs(expected - received).max())


def save_preset(
    model: Any, x: Any, precision: str, output: Path, console: Console
) -> tuple[Any, float]:
    """Save a task as `preset` in a folder, load it back, and compare the two.

    **Args**
        model: The task that was trained.
        x: Token ids and masks of a batch.
        precision: Dtype policy to load it with.
        output: The folder.
        console: Where messages go.

    **Returns** The task that was loaded, and the largest absolute difference of their logits, which
    `finish` refuses if it is too large.
    """
    preset = output / "preset"
    model.save_to_preset(str(preset))
    task = type(model).from_preset(str(preset), dtype=precision)
    largest = difference(logits_of(model, x), logits_of(task, x))
    console.print(f"Preset: {preset}; loaded back, its logits differ by at most {largest:.1e}.")
    return task, largest


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
        "machine": machine(),
        "source": source,
        **counts,
        "config": dataclasses.asdict(config),
    }


def machine() -> str:
    """Return what this process computes on: processor, cores, and accelerators that Keras sees."""
    import keras

    if keras.config.backend() == "torch":  # whose devices Keras does not list
        import torch

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        devices = [device for device in keras.distribution.list_devices() if "cpu" not in device]
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *devices])


def peak_bytes() -> int:
    """Return the most main memory that this process has held, as Linux tells it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def is_finished(output: Path) -> bool:
    """Whether a folder holds a run that is done: `finish` refused nothing of it."""
    return (output / "metrics.json").is_file() and not (output / "backup").is_dir()


def finish(output: Path, metrics: dict[str, Any], console: Console) -> None:
    """Write the figures, and only then give up the backup, from which the run could go on.

    **Args**
        output: Folder of the run.
        metrics: What `metrics.json` gets.
        console: Where messages go.

    **Raises** RuntimeError if the reloaded preset or an exported file is not the trained model:
    `reload_max_abs_difference` or one of `export_max_abs_difference` in `metrics` is too large. The
    figures are written then, and the backup stays.
    """
    write_json(output / "metrics.json", metrics)
    found = [("the reloaded preset", metrics["reload_max_abs_difference"], RELOAD_TOLERANCE)]
    for format, largest in metrics.get("export_max_abs_difference", {}).items():
        if largest is not None:
            found.append((f"the {format} export", largest, EXPORT_TOLERANCE))
    differing = [
        f"those of {what} by {largest:.2e}, more than {tolerance:.0e}"
        for what, largest, tolerance in found
        if not largest <= tolerance  # NaN is too large as well
    ]
    if differing:
        raise RuntimeError(
            f"Outputs differ from the trained model's: {'; '.join(differing)}. GPUs that multiply "
            "in TF32 differ from a CPU by about 1e-3. The figures are in "
            f"{output / 'metrics.json'}, and the backup stays."
        )
    shutil.rmtree(output / "backup", ignore_errors=True)
    console.print(f"Finished in {metrics['seconds']:.0f} s. Figures: {output / 'metrics.json'}")
