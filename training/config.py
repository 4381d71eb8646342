"""Load an experiment's TOML file into a frozen dataclass that names every key."""

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

_Config = TypeVar("_Config")


def load_config(
    config_class: type[_Config], path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> _Config:
    """Read a TOML file, apply overrides, and check every key and type.

    Fields of the dataclass are `int`, `float`, `str`, `bool`, or another dataclass, which is a
    section of the file. A field without a default must be in the file.

    **Args**
        config_class: A dataclass.
        path: The TOML file.
        overrides: `"section.key=value"` strings, applied in order. The value is read as TOML, and
            as a string if it is none.

    **Returns** An instance of `config_class`.

    **Raises** FileNotFoundError if there is no such file; ValueError for broken TOML and for an
    unknown or missing key; TypeError for a value of the wrong type. The message names the key.

    **Example**

    >>> load_config(Config, "run.toml", ["training.steps=10"]).training.steps  # doctest: +SKIP
    10
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such config. Pass the path of a TOML file.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is not valid TOML: {error}.") from error
    for override in overrides:
        _override(values, override)
    return config_of(config_class, values, str(path))


def config_of(config_class: type[_Config], values: Mapping[str, Any], source: str) -> _Config:
    """Return values, such as a `metrics.json` keeps of a run, as a config.

    **Args**
        config_class: As in `load_config`.
        values: Its keys and sections. What has a default may be missing.
        source: What errors call them.

    **Returns** An instance of `config_class`.

    **Raises** As `load_config`.

    **Example**

    >>> config_of(Config, {"seed": 1, "training": {"steps": 10}}, "here").seed  # doctest: +SKIP
    1
    """
    return _build(config_class, values, source, "")


def _override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in `values`."""
    dotted, equals, text = override.partition("=")
    *sections, key = dotted.strip().split(".")
    if not equals or not all((*sections, key)):
        raise ValueError(f"An override is written `section.key=value`. Received: {override!r}")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{section!r} is a value, not a section. Received: {override!r}")
    try:
        values[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        values[key] = text.strip()


def _build(config_class: type[Any], values: Mapping[str, Any], source: str, prefix: str) -> Any:
    """Return an instance of the dataclass made from one section."""
    types = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{source}: there is no key {prefix + key!r}. Did you mean {prefix + near!r}? "
                f"Known here: {', '.join(fields)}."
            )
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(types[name], values[name], source, prefix + name)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{source}: the key {prefix + name!r} is missing.")
    try:
        return config_class(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _convert(kind: type[Any], value: Any, source: str, name: str) -> Any:
    """Return `value` as `kind`, or raise TypeError; an integer may stand for a float."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise TypeError(f"{source}: {name!r} is a section. Received: {value!r}")
        return _build(kind, value, source, f"{name}.")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(
            f"{source}: {name!r} must be of type {kind.__name__}. Received: {value!r} of type "
            f"{type(value).__name__}"
        )
    return value
