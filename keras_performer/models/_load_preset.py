"""`from_preset` of this package's classes: short names, and clear errors for damaged folders."""

import functools
import inspect
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import h5py
import keras
import keras_hub

from keras_performer.presets import local_folder, verify_folder

_Class = TypeVar("_Class", bound=type)

_ADVICE = "Copy the preset again from where it came from, or write it again with `save_to_preset`."


def load_by_name(cls: _Class) -> _Class:
    """Let `cls.from_preset` take the short name of a preset, and explain damaged presets.

    **Args**
        cls: A keras-hub class with a `from_preset` class method.

    **Returns** `cls`, whose `from_preset` takes a short name from `presets()`, a folder, or what
    keras-hub takes (`hf://...`).

    **Raises** (from `from_preset`) ValueError if a name is unknown, or if a file of a local preset
    is missing, cannot be read, or is not the one that its `SHA256SUMS` records; the message names
    the file. Also if a preset holds a tokenizer of another class.
    """
    # What a base class was given by this function is not wrapped again.
    load = inspect.unwrap(cls.from_preset.__func__)
    if issubclass(cls, keras_hub.tokenizers.Tokenizer):
        load = _load_tokenizer

    @functools.wraps(load)
    def from_preset(cls, preset: str | os.PathLike[str], *args: Any, **kwargs: Any):
        preset = os.fspath(preset)
        if "://" in preset:
            return load(cls, preset, *args, **kwargs)
        folder = local_folder(preset)
        verify_folder(folder)
        load_weights = args[0] if args else kwargs.get("load_weights", True)
        wants_weights = issubclass(cls, keras.Model) and load_weights
        check_files(folder, wants_weights, has_head(cls))
        if issubclass(cls, keras.Model) and _is_mixed(folder):
            # keras-hub does so where all was saved in one type, and knows no mixed ones.
            kwargs.setdefault("dtype", keras.config.dtype_policy())
        try:
            return load(cls, str(folder), *args, **kwargs)
        except FileNotFoundError as error:
            message = f"The preset {str(folder)!r} is incomplete: {error} {_ADVICE}"
            raise ValueError(message) from error
        except Exception as error:
            _check_weights(folder, error)
            raise

    cls.from_preset = classmethod(from_preset)
    return cls


def _is_mixed(folder: Path) -> bool:
    """Whether the model of a preset was saved under a policy such as `mixed_bfloat16`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("config", {}).get("dtype") or {}
    return str(dtype.get("config", {}).get("name")).startswith("mixed_")


def _load_tokenizer(cls: type, preset: str, *args: Any, **kwargs: Any) -> Any:
    """Load the tokenizer of a preset, which may be for any kind of backbone.

    keras-hub's own method wants a subclass of `cls` for the preset's backbone, and returns what the
    preset holds, of whatever class it is.
    """
    tokenizer = keras_hub.tokenizers.Tokenizer.from_preset(preset, *args, **kwargs)
    if not isinstance(tokenizer, cls):
        raise ValueError(
            f"The preset {preset!r} has a {type(tokenizer).__name__}: load it with that class, or "
            f"with `keras_hub.tokenizers.Tokenizer`. Received: {cls.__name__}.from_preset"
        )
    return tokenizer


def has_head(cls: type) -> bool:
    """Whether models of a class have weights of their own beside those of their backbone."""
    headless = (keras_hub.models.CausalLM, keras_hub.models.Seq2SeqLM)
    return issubclass(cls, keras_hub.models.Task) and not issubclass(cls, headless)


def check_files(folder: Path, wants_weights: bool, has_head: bool) -> None:
    """Raise ValueError unless the needed files exist and every JSON file can be parsed.

    **Args**
        folder: A local preset.
        wants_weights: Whether weights are to be loaded.
        has_head: Whether a task with weights of its own is wanted, and not its backbone alone.

    **Raises** ValueError; the message names the file.
    """
    needed: list[tuple[str, ...]] = [("config.json",)]
    if wants_weights:
        needed.append(("model.weights.h5", "model.weights.json"))
        if has_head and (folder / "task.json").is_file():
            # keras-hub would leave the head at random values without a word.
            needed.append(("task.weights.h5",))
    for names in needed:
        if not any((folder / name).is_file() for name in names):
            raise ValueError(
                f"The preset {str(folder)!r} is incomplete: {names[0]!r} is missing. {_ADVICE}"
            )
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not valid JSON ({error}). {_ADVICE}") from error


def _read(_: str, item: h5py.Dataset | h5py.Group) -> None:
    if isinstance(item, h5py.Dataset):
        item[()]


def _check_weights(folder: Path, cause: Exception) -> None:
    """Raise ValueError, from `cause`, if a weights file cannot be read to its end."""
    for path in sorted(folder.glob("*.weights.h5")):
        try:
            with h5py.File(path, "r") as file:
                file.visititems(_read)
        except Exception as error:
            raise ValueError(
                f"The weights file {str(path)!r} is damaged or cut short ({error}). {_ADVICE}"
            ) from cause
