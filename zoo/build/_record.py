"""What `metrics.json` in a folder of the zoo holds: the evidence that a card shows."""

import dataclasses
import importlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from keras_performer import convert, models


@dataclasses.dataclass(frozen=True)
class Data:
    """What the model was trained and measured on.

    **Args**
        source: Names, versions and addresses.
        licence: Of the data.
        split: How the held-out part was chosen.
        counts: What there is of each part, such as `{"proteins to train on": 5494}`.
    """

    source: str
    licence: str
    split: str
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the loss curve: losses after `step` steps."""

    step: int
    loss: float
    val_loss: float | None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One figure on held-out data, for three models.

    **Args**
        name: Such as "perplexity".
        better: Which way is better.
        model: Of this model.
        softmax_twin: Of the same model with softmax attention, trained alike; None: there is none.
        baseline: Of the trivial baseline.
    """

    name: str
    better: Literal["lower", "higher"]
    model: float
    softmax_twin: float | None
    baseline: float


@dataclasses.dataclass(frozen=True)
class Weights:
    """What `publish` finds out about the stored weights.

    **Args**
        parameters: Number of parameters, with those that are not trained.
        bytes: Size of the files.
        largest_output: Largest absolute output of the model on the inputs that `publish` was given.
        output_difference: Largest absolute difference of these outputs from those of the weights
            before they were rounded to float16.
    """

    parameters: int
    bytes: int
    largest_output: float
    output_difference: float


@dataclasses.dataclass(frozen=True)
class Record:
    """All of `metrics.json`.

    **Args**
        name: Of the preset and of its folder.
        task: Name of the class in `keras_performer.models` or `keras_performer.convert`.
        summary: What it is, in one sentence.
        data: What it was trained and measured on.
        config: The content of its TOML file.
        hardware: Such as "2 x86 cores of a virtual machine".
        backend: With versions, such as "Keras 3.15.1 on jax 0.10".
        wall_seconds: Of the whole job.
        tokens_seen: In training.
        steps: Of training.
        curve: The loss curve, at least two points.
        evaluation: What `metrics` were measured on and how sure they are.
        metrics: Held-out figures, the most telling one first.
        softmax_twin: How the softmax twin was trained, or the reason why there is none.
        baseline: What the trivial baseline is.
        limits: What the model cannot do, one sentence each.
        intended_use: What it is for, and what not.
        rebuild: The command that makes it again.
        weights: Filled in by `publish`.
    """

    name: str
    task: str
    summary: str
    data: Data
    config: dict[str, Any]
    hardware: str
    backend: str
    wall_seconds: float
    tokens_seen: int
    steps: int
    curve: list[Point]
    evaluation: str
    metrics: list[Metric]
    softmax_twin: str
    baseline: str
    limits: list[str]
    intended_use: str
    rebuild: str
    weights: Weights | None = None

    def __post_init__(self) -> None:
        for key, least in (("curve", 2), ("metrics", 1), ("limits", 1)):
            if len(getattr(self, key)) < least:
                raise ValueError(f"'{key}' must have {least} or more entries.")


def task_home(task: str) -> str:
    """Return the module that a task's class is imported from, as cards say it.

    **Raises** ValueError if there is no such class.
    """
    for module in (models, convert):
        if task in module.__all__:
            return module.__name__
    raise ValueError(
        "'task' must name a class of keras_performer.models or keras_performer.convert. Received: "
        f"{task!r}"
    )


def task_class(task: str) -> Any:
    """Return the class of a task by its name; see `task_home`."""
    return getattr(importlib.import_module(task_home(task)), task)


def read_record(path: Path) -> Record:
    """Read and check the `metrics.json` of a published preset.

    **Raises** ValueError that names the file and the key if something is missing, unknown, empty,
    of the wrong type, not finite, or if the record is not that of its folder.
    """
    try:
        record = _convert(Record, json.loads(path.read_text(encoding="utf-8")), "")
        if record.weights is None:
            raise ValueError("'weights' is missing: `publish` of zoo.build fills it in.")
        if record.name != path.parent.name:
            raise ValueError(f"'name' is {record.name!r}, and the folder {path.parent.name!r}.")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return record


def write_record(record: Record, path: Path) -> None:
    """Write a record, and read it again, which checks it."""
    text = json.dumps(dataclasses.asdict(record), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    read_record(path)


def _convert(kind: Any, value: Any, name: str) -> Any:
    """Return a JSON value as the type of the field `name`, or raise ValueError."""
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is types.UnionType:  # with None
        return None if value is None else _convert(arguments[0], value, name)
    if origin is Literal:
        fits = value in arguments
    elif origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, Mapping):
        fits = len(value) > 0
        value = {key: _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    elif kind is float:
        fits = type(value) in (int, float) and math.isfinite(value)
    elif kind is str:
        fits = isinstance(value, str) and value.strip() != ""
    else:
        fits = kind is Any or type(value) is kind
    if not fits:
        needed = "finite number" if kind is float else str(getattr(kind, "__name__", kind))
        raise ValueError(f"'{name}' must be a {needed}, not empty. Received: {value!r}")
    return value


def _build(kind: type, value: Any, name: str) -> Any:
    """Return an instance of a dataclass made from a JSON object."""
    prefix = f"{name}." if name else ""
    if not isinstance(value, Mapping):
        raise ValueError(f"'{name}' must be an object. Received: {value!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise ValueError(f"'{prefix}{key}' is unknown. Known: {', '.join(fields)}.")
    for key, field in fields.items():
        if key not in value and field.default is dataclasses.MISSING:
            raise ValueError(f"'{prefix}{key}' is missing.")
    hints = get_type_hints(kind)
    return kind(**{key: _convert(hints[key], item, prefix + key) for key, item in value.items()})
