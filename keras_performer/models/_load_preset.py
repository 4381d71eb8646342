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
from keras_hub.src.utils.preset_utils import get_preset_loader

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
    elif issubclass(cls, keras_hub.models.Preprocessor):
        load = _load_preprocessor

    @functools.wraps(load)
    def from_preset(cls, preset: str | os.PathLike[str], *args: Any, **kwargs: Any):
        preset = os.fspath(preset)
        if "://" in preset:
            return load(cls, preset, *args, **kwargs)
        folder = local_folder(preset)
        verify_folder(folder)
        is_model = issubclass(cls, keras.Model)
        wants_weights = is_model and (args[0] if args else kwargs.get("load_weights", True))
        check_files(folder, wants_weights)
        if is_model and (dtype := _dtype_of(folder)) is not None:
            kwargs.setdefault("dtype", dtype)
        try:
            loaded = load(cls, str(folder), *args, **kwargs)
        except FileNotFoundError as error:
            message = f"The preset {str(folder)!r} is incomplete: {error} {_ADVICE}"
            raise ValueError(message) from error
        except Exception as error:
            _check_weights(folder, error)
            raise
        # With `num_classes` keras-hub makes a new head.
        if wants_weights and "num_classes" not in kwargs:
            check_head(folder, loaded)
        return loaded

    cls.from_preset = classmethod(from_preset)
    return cls


def _dtype_of(folder: Path) -> Any:
    """The dtype to load a model in, where keras-hub alone would not choose it; else None."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("config", {}).get("dtype") or {}
    if str(dtype.get("config", {}).get("name")).startswith("mixed_"):
        # keras-hub does so where all was saved in one type, and knows no mixed ones.
        return keras.config.dtype_policy()
    # A map says which layers are quantized. keras-hub reads it for whole tasks only.
    return dtype if dtype.get("class_name") == "DTypePolicyMap" else None


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


def _load_preprocessor(
    cls: type, preset: str, config_file: str = "preprocessor.json", **kwargs: Any
) -> Any:
    """Load a preprocessor from a preset, which may be for any kind of backbone.

    keras-hub's own method wants a subclass of `cls` for the preset's backbone.
    """
    return get_preset_loader(preset).load_preprocessor(cls, config_file, **kwargs)


def check_files(folder: Path, wants_weights: bool) -> None:
    """Raise ValueError unless the needed files exist and every JSON file can be parsed.

    **Args**
        folder: A local preset.
        wants_weights: Whether weights are to be loaded.

    **Raises** ValueError; the message names the file.
    """
    needed: list[tuple[str, ...]] = [("config.json",)]
    if wants_weights:
        needed.append(("model.weights.h5", "model.weights.json"))
    for names in needed:
        if not any((folder / name).is_file() for name in names):
            _raise_incomplete(folder, names[0])
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not valid JSON ({error}). {_ADVICE}") from error


def check_head(folder: Path, model: Any) -> None:
    """Raise ValueError if the head of a saved task was left at random values.

    keras-hub does so without a word. A new head on the backbone of another task is no such case.

    **Args**
        folder: The local preset.
        model: What was loaded from it, with weights.

    **Raises** ValueError; the message names the file.
    """
    if not isinstance(model, keras_hub.models.Task) or not (folder / "task.json").is_file():
        return
    saved = json.loads((folder / "task.json").read_text(encoding="utf-8"))["registered_name"]
    is_saved = keras.saving.get_registered_name(type(model)) == saved
    if is_saved and model.has_task_weights() and not (folder / "task.weights.h5").is_file():
        _raise_incomplete(folder, "task.weights.h5")


def _raise_incomplete(folder: Path, name: str) -> None:
    raise ValueError(f"The preset {str(folder)!r} is incomplete: {name!r} is missing. {_ADVICE}")


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
