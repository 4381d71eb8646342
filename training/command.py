"""What the command of every recipe does before it trains: flags, the backend, the output folder."""

import argparse
import ctypes
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from training.config import config_of
from training.data.registry import replacing

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.


def make_parser(
    recipe: str, description: str, config: Path | None = None
) -> argparse.ArgumentParser:
    """Return the parser of the flags that every recipe takes.

    **Args**
        recipe: Name of the module in `training`.
        description: What the recipe does.
        config: The config that is used if none is named. Default: one must be named.
    """
    parser = argparse.ArgumentParser(prog=f"python -m training.{recipe}", description=description)
    parser.add_argument(
        "--config", type=Path, default=config, required=config is None,
        help="TOML file of the experiment" + ("" if config is None else f" (default: {config})"),
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="replace one key of the config, such as training.steps=1000; repeatable",
    )  # fmt: skip
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), help="Keras backend")
    parser.add_argument(
        "--distribution", metavar="data|model:K",
        help="train on all devices: data divides each batch among them, and model:K also the "
        "weights of each copy among K (JAX; on TensorFlow data only)",
    )  # fmt: skip
    output = Path("runs") / recipe
    parser.add_argument("--output", type=Path, default=output, help=f"folder (default: {output})")
    return parser


def make_console() -> Console:
    """Return where messages go. It prints texts and paths in brackets as they are, not as markup.

    **Example**

    >>> make_console().render_str("[/url]").plain
    '[/url]'
    """
    return Console(markup=False)


def start_keras(backend: str | None, seed: int) -> None:
    """Import Keras on a backend, and seed it.

    **Raises** ImportError if the backend is not installed; ValueError if Keras already runs on
    another one.
    """
    # TensorFlow's start-up messages; what goes wrong is still raised.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    try:
        import keras
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Keras cannot start its backend: {error}. Install it, or choose another one with "
            "--backend."
        ) from error

    if backend not in (None, keras.config.backend()):
        raise ValueError(
            f"Keras already runs on {keras.config.backend()} in this process, so --backend "
            f"{backend} comes too late."
        )
    if keras.config.backend() == "torch":
        keep_freed_memory()
    keras.utils.set_random_seed(seed)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what is allocated next, where it is glibc.

    It gives large arrays back to the system, and takes new ones, whose pages cost more than many of
    PyTorch's operators on a CPU do. TensorFlow and JAX allocate by their own means.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
        for parameter in (trim_threshold, mmap_threshold):
            mallopt(parameter, 2**31 - 1)


def use_devices(arguments: argparse.Namespace, config: Any) -> None:
    """Spread the run over several devices if `--distribution` says so.

    **Args**
        arguments: The parsed command line. Its `output` becomes a folder in that folder in all
            but the first process of several hosts.
        config: The config of the run, an `Experiment` with the sections `model` and `training`.

    **Raises** ValueError or ImportError, as `start_keras` and `training.distribution.distribute`.
    """
    if arguments.distribution is None:
        return
    start_keras(arguments.backend, config.seed)
    from training.distribution import distribute

    # The shape of a preset is not that of the config.
    model = None if getattr(arguments, "preset", None) else config.model
    process = distribute(arguments.distribution, config.training, model)
    if process:
        # Processes of several hosts do all the same; each keeps what it writes to itself.
        arguments.output = arguments.output / f"process_{process}"


def prepare_output(output: Path, config: Any, data_sha256: str) -> Path:
    """Make the folder, check that it can be written, and that it holds no other unfinished run.

    Call it last: of a finished run it deletes `metrics.json`, which a refused command must not.

    **Args**
        output: The folder.
        config: The config of the run, a dataclass.
        data_sha256: What identifies the data of the run.

    **Raises** ValueError if the folder cannot be written, or if the unfinished run in it has
    another config or other data.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"The output folder cannot be written: {error}. Pass --output.") from error
    record = output / "run.json"
    if (output / "backup").is_dir():
        run = json.loads(record.read_text(encoding="utf-8"))
        # As a config, because a key that is newer than the run has its default there.
        made_with = config_of(type(config), run["config"], str(record))
        if (made_with, run["data_sha256"]) != (config, data_sha256):
            raise ValueError(
                f"{output} holds an unfinished run with another config or other data ({record}). "
                "Repeat its command to finish it, pass another --output, or delete "
                f"{output / 'backup'}."
            )
    write_json(record, {"config": dataclasses.asdict(config), "data_sha256": data_sha256})
    (output / "metrics.json").unlink(missing_ok=True)
    return output


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or, if the process is killed, not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
