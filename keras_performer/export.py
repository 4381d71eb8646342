"""Write trained models in formats that run without this package."""

import importlib.util
import inspect
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import keras

FORMATS = ("tf_saved_model", "litert")

_SAVED_MODEL_FILES = {"saved_model.pb", "variables", "assets", "fingerprint.pb"}
_LITERT_MAGIC = b"TFL3"


def export(
    model_or_preset: keras.Model | str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str = "tf_saved_model",
) -> Path:
    """Write the inference pass of a model as a SavedModel or a LiteRT (TFLite) file.

    The artefact takes the model's inputs by their names, with any batch size and length, and gives
    one output: `logits` for a task, `output` for anything else, as float32. Strings are not
    tokenized in it: prepare inputs with the model's preprocessor.

    **Shapes** As the model's: `token_ids` and `padding_mask` (B, T), `mask_positions` (B, P).

    **Args**
        model_or_preset: A built functional or Sequential model, or the name or folder of a preset.
        path: The folder (SavedModel) or file (LiteRT) to write. An earlier artefact of the same
            format there is replaced; anything else is left alone, with an error. Nothing is
            replaced before the new artefact is complete.
        format: `"tf_saved_model"`, under the TensorFlow and JAX backends, or `"litert"`, under the
            TensorFlow backend, made of builtin LiteRT operators only.

    **Returns** The path written.

    **Masking** As in the model: a padded token changes no other token's output.

    **Precision** That of the model; LiteRT runs float32 only.

    **Raises** ValueError for an unknown format, a model that is not built or has several outputs, a
    path that holds something else, a model in half precision or with operators that LiteRT lacks;
    TypeError if the model is no Keras model; NotImplementedError if the running backend cannot
    write the format; ImportError under JAX without TensorFlow.

    **Example**

    >>> export("my-preset", "model.tflite", format="litert")  # doctest: +SKIP
    PosixPath('model.tflite')

    **Source** LiteRT's signatures and operator sets: https://ai.google.dev/edge/litert.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}. Received: format={format!r}")
    _check_backend(format)
    target = Path(path)
    _check_target(target, format)
    if isinstance(model_or_preset, str | os.PathLike):
        model = _load(os.fspath(model_or_preset))
    else:
        model = model_or_preset
    _check_model(model, format)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        written = Path(scratch) / "saved_model"
        if format == "litert":
            written = _convert_to_litert(model, written)
        else:
            _write_saved_model(model, written)
        if target.is_dir():
            shutil.rmtree(target)
        written.replace(target)
    return target


def _check_backend(format: str) -> None:
    backend = keras.config.backend()
    able = ("tensorflow", "jax") if format == "tf_saved_model" else ("tensorflow",)
    if backend not in able:
        raise NotImplementedError(
            f"The {backend} backend cannot write format={format!r}: save the model with "
            "`save_to_preset` and export that preset under the TensorFlow backend "
            "(KERAS_BACKEND=tensorflow)."
        )
    if backend == "jax" and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "A SavedModel is written by TensorFlow, which is not installed: "
            "`pip install tensorflow`."
        )


def _check_target(target: Path, format: str) -> None:
    """Raise ValueError if `target` holds anything but an artefact of this format."""
    if not target.exists():
        return
    if format == "litert":
        replaceable = target.is_file() and target.read_bytes()[4:8] == _LITERT_MAGIC
    else:
        names = {item.name for item in target.iterdir()} if target.is_dir() else {""}
        replaceable = names <= _SAVED_MODEL_FILES
    if not replaceable:
        raise ValueError(
            f"`path` exists and is no earlier artefact of format={format!r}, so it is not "
            f"replaced. Choose another path, or remove it first. Received: path={str(target)!r}"
        )


def _load(preset: str) -> keras.Model:
    """Load the task in a preset, or the backbone where there is no task."""
    import keras_performer.models  # noqa: F401 - registers the classes that a preset names
    from keras_performer.models._load_preset import check_files, has_head
    from keras_performer.presets import preset_path

    folder = Path(preset) if os.path.isdir(preset) else preset_path(preset)
    check_files(folder, wants_weights=True, has_head=False)
    file = folder / ("task.json" if (folder / "task.json").is_file() else "config.json")
    name = json.loads(file.read_text(encoding="utf-8"))["registered_name"]
    model_class = keras.saving.get_registered_object(name)
    if model_class is None:
        raise ValueError(
            f"The preset {str(folder)!r} holds a model of class {name!r}, which is not known here. "
            "Import the package that defines it, load the model, and pass the model."
        )
    check_files(folder, wants_weights=True, has_head=has_head(model_class))
    return model_class.from_preset(str(folder))


def _check_model(model: Any, format: str) -> None:
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`export` takes a Keras model, or the name or folder of a preset. Received: "
            f"model_or_preset={model!r} of type {type(model).__name__}"
        )
    if not model.built:
        raise ValueError(
            "The model is not built, so its inputs are unknown. Call it on data, or `build` it, "
            f"first. Received: model={model.name!r}"
        )
    if not isinstance(model, keras.Sequential) and not _is_functional(model):
        raise ValueError(
            "`export` takes functional and Sequential models, whose inputs have names. Wrap the "
            "model's call in `keras.Model(inputs, outputs)`. Received: a model of type "
            f"{type(model).__name__}"
        )
    if len(model.outputs) != 1:
        raise ValueError(
            "`export` writes models with one output. Make a `keras.Model` of the one that is "
            f"wanted. Received: {len(model.outputs)} outputs"
        )
    if format == "litert" and model.compute_dtype != "float32":
        raise ValueError(
            "LiteRT runs float32: load the preset with dtype='float32' and export that. Received: "
            f"a model with dtype policy {model.dtype_policy.name!r}"
        )


def _is_functional(model: keras.Model) -> bool:
    return any(cls.__name__ == "Functional" for cls in inspect.getmro(type(model)))


def _endpoint(model: keras.Model) -> tuple[Any, dict[str, keras.InputSpec]]:
    """Return a function from inputs by name to outputs by name, and the inputs' specs."""
    specs = {
        tensor.name: keras.InputSpec(
            shape=(None, *tensor.shape[1:]), dtype=tensor.dtype, name=tensor.name
        )
        for tensor in model.inputs
    }
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    output_name = "logits" if _is_task(model) else "output"

    def serve(inputs: dict[str, Any]) -> dict[str, Any]:
        named = keras.tree.map_structure(lambda tensor: inputs[tensor.name], structure)
        outputs = keras.tree.flatten(model(named, training=False))
        return {output_name: keras.ops.cast(outputs[0], "float32")}

    return serve, specs


def _is_task(model: keras.Model) -> bool:
    # Tasks come from keras-hub: where it has not been imported, the model is none.
    hub = sys.modules.get("keras_hub")
    return hub is not None and isinstance(model, hub.models.Task)


def _write_saved_model(model: keras.Model, folder: Path) -> None:
    serve, specs = _endpoint(model)
    options = {}
    if keras.config.backend() == "jax":
        options["jax2tf_kwargs"] = {"polymorphic_shapes": [_symbolic_shapes(specs)]}
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", serve, [specs], **options)
    archive.write_out(str(folder), verbose=False)


def _symbolic_shapes(specs: dict[str, keras.InputSpec]) -> dict[str, str]:
    """Name the unknown axes for JAX: equal names promise equal sizes."""
    shapes = {}
    for name, spec in specs.items():
        length = "places" if name == "mask_positions" else "length"
        axes = ["batch"]
        for i, size in enumerate(spec.shape[1:]):
            axes.append(str(size) if size is not None else length if i == 0 else f"{length}_{i}")
        shapes[name] = f"({', '.join(axes)})"
    return shapes


def _convert_to_litert(model: keras.Model, folder: Path) -> Path:
    import tensorflow as tf

    from keras_performer.ops import export_loops

    with export_loops():
        _write_saved_model(model, folder)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), ["serve"])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except Exception as error:
        raise ValueError(
            "The model needs an operator that LiteRT does not have, so it cannot be written as a "
            f"LiteRT file; format='tf_saved_model' takes any model. The converter said: {error}"
        ) from error
    file = folder.with_suffix(".tflite")
    file.write_bytes(content)
    return file
