"""Make a folder of the zoo from a preset that a recipe saved."""

import dataclasses
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

import keras_performer
from keras_performer.presets import files_on_record, sha256
from zoo.build._card import card, draw_curve
from zoo.build._record import Record, Weights, task_class, write_record

ZOO = Path(__file__).resolve().parents[1]
# The names of a classifier's outputs, which recipes write beside the preset.
CLASSES = "classes.json"
# Half a step of float16 is 2**-11 of a number. An array of very large or very small numbers loses
# more than that, and stays as it is.
LARGEST_ROUNDING = 2.0**-10


def publish(preset: Path, record: Record, inputs: Any, zoo: Path = ZOO) -> Path:
    """Write `zoo/<record.name>`: configs, float16 weights, `metrics.json`, card and checksums.

    The preset is loaded from both folders with what Keras runs on, to check that types and values
    come back and to measure what the rounding does to outputs. A folder of that name is replaced at
    the end, and stays if anything fails before.

    **Args**
        preset: A folder that `save_to_preset` of a task wrote.
        record: The evidence; `weights` is filled in here.
        inputs: A batch for the model, from held-out data.
        zoo: Where the folder goes.

    **Returns** The folder.

    **Raises** ValueError if the record is incomplete or its name cannot be that of a folder, and
    if what is loaded is not what was trained.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", record.name) or record.name == "build":
        raise ValueError(
            "A preset has a name of lower-case letters, digits and underscores, and not 'build'. "
            f"Received: name={record.name!r}"
        )
    with tempfile.TemporaryDirectory(dir=zoo, prefix=".") as scratch:
        folder = Path(scratch) / record.name
        task = task_class(record.task)
        # Whatever it was trained in: who loads it chooses the precision.
        trained = task.from_preset(preset, dtype="float32")
        # Saved anew, because keras-hub saves the optimizer with a task that was trained: of that of
        # a new task there are its step count, zero, and its rate, which Keras looks for on loading.
        trained.save_to_preset(str(folder))
        if (classes := preset / CLASSES).is_file():
            shutil.copy(classes, folder)
        for path in folder.glob("*.weights.h5"):
            round_weights(path)
        stored = task.from_preset(folder)
        check_weights(trained, stored)
        largest, difference = _compare_outputs(trained, stored, inputs)
        weights = Weights(
            parameters=stored.count_params(),
            bytes=sum(path.stat().st_size for path in folder.glob("*.weights.h5")),
            largest_output=largest,
            output_difference=difference,
        )
        record = dataclasses.replace(record, weights=weights)
        write_record(record, folder / "metrics.json")
        draw_curve(record, folder / "curve.png")
        (folder / "README.md").write_text(card(folder), encoding="utf-8")
        write_checksums(folder)
        keras_performer.verify(folder)
        target = zoo / record.name
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    return target


def move_to_url(folder: Path, url: str, archive: Path) -> None:
    """Pack a folder of the zoo into a zip file, and leave what points to it in its place.

    **Args**
        folder: A folder that `publish` wrote. Its card, curve and `metrics.json` stay in it.
        url: Where the file will be. Upload it there.
        archive: The zip file that is written.

    **Raises** ValueError if `archive` does not end in ".zip", and if the folder was moved before or
        is not whole.
    """
    if archive.suffix != ".zip":
        raise ValueError(f"The archive must end in '.zip'. Received: archive={str(archive)!r}")
    # The archive may be the only copy of the weights by now.
    if (folder / "remote.json").is_file():
        raise ValueError(f"This folder was moved to a URL before. Received: folder={str(folder)!r}")
    keras_performer.verify(folder)
    shutil.make_archive(str(archive.with_suffix("")), "zip", folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("metrics.json", "curve.png"):
            path.unlink()
    remote = json.dumps({"url": url, "sha256": sha256(archive)}, indent=2)
    (folder / "remote.json").write_text(remote + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(folder), encoding="utf-8")


def round_weights(path: Path) -> None:
    """Write a `.weights.h5` file anew, with weights as float16.

    Keras casts what it reads to the type of the variable. Integers stay as they are, and so do
    arrays that float16 would change by more than `LARGEST_ROUNDING` of their largest value. There
    is no compression: wheels and git do that.
    """
    rounded = path.with_suffix(".float16")
    # The first format of HDF5 spends a kilobyte on every group.
    with h5py.File(path) as source, h5py.File(rounded, "w", libver=("v110", "v110")) as target:

        def copy(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            value = item[()]
            is_weight = not name.startswith("optimizer/")  # but its learning rate
            if is_weight and value.dtype in (np.float32, np.float64):
                value = round_array(value)
            target[name] = value
            target[name].attrs.update(item.attrs)
            target[name].parent.attrs.update(item.parent.attrs)

        source.visititems(copy)
    os.replace(rounded, path)


def round_array(value: np.ndarray) -> np.ndarray:
    """Return an array as float16, or as it is where that would lose more than it should."""
    with np.errstate(over="ignore"):
        half = value.astype("float16")
    largest = np.abs(value).max(initial=0.0)
    # Not `>`: infinity minus infinity is no number.
    fits = np.abs(half.astype(value.dtype) - value).max(initial=0.0) <= LARGEST_ROUNDING * largest
    return half if fits else value


def check_weights(trained: keras.Model, stored: keras.Model) -> None:
    """Raise ValueError unless loaded weights are the trained ones, rounded, of the same types."""
    for new, old in zip(stored.weights, trained.weights, strict=True):
        expected = keras.ops.convert_to_numpy(old)
        if np.issubdtype(expected.dtype, np.floating):
            expected = round_array(expected)
        if new.dtype != old.dtype or not np.array_equal(keras.ops.convert_to_numpy(new), expected):
            raise ValueError(
                f"The weight {new.path!r} of type {new.dtype} is not what was trained, rounded: "
                f"{old.path!r} of type {old.dtype}."
            )


def _compare_outputs(trained: keras.Model, stored: keras.Model, inputs: Any) -> tuple[float, float]:
    """Return the largest absolute output, and the largest absolute difference of outputs."""
    pairs = [
        (keras.ops.convert_to_numpy(old), keras.ops.convert_to_numpy(new))
        for old, new in zip(
            keras.tree.flatten(trained(inputs, training=False)),
            keras.tree.flatten(stored(inputs, training=False)),
            strict=True,
        )
    ]
    largest = max(float(np.abs(old).max()) for old, _ in pairs)
    return largest, max(float(np.abs(old - new).max()) for old, new in pairs)


def write_checksums(folder: Path) -> None:
    """Write the `SHA256SUMS` that `keras_performer.verify` reads."""
    lines = [
        f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n"
        for path in files_on_record(folder)
    ]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
