"""Write trained models in formats that run without this package.

`python -m keras_performer.export PRESET OUT` does it from a shell: see `--help`.
"""

import argparse
import copy
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_performer.presets import local_folder

FORMATS = ("tf_saved_model", "litert", "onnx")
WEIGHTS = ("float32", "float16", "int8")

_ENDINGS = {"litert": ".tflite", "onnx": ".onnx"}
_SAVED_MODEL_FILES = {"saved_model.pb", "variables", "assets", "assets.extra", "fingerprint.pb"}
_EXAMPLE_FILES = {"example.py", "vocabulary.json", "tokenizer"}
_EXAMPLE = Path(__file__).with_name("_export_example.txt")
_ONNX_OPSET = 18
# Smaller tensors stay float32: they save nothing, and constants of the algorithm are among them.
_SMALLEST_HALVED = 1024
_FORWARDED = {
    error.__name__: error for error in (ValueError, TypeError, ImportError, NotImplementedError)
}

Endpoints = dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, keras.InputSpec]]]


def export(
    model_or_preset: keras.Model | str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str = "tf_saved_model",
    *,
    weights: str = "float32",
) -> Path:
    """Write the inference pass of a model as a SavedModel, a LiteRT (TFLite) or an ONNX file.

    It works from every backend. TensorFlow does the writing: under JAX and PyTorch the model is
    saved, and a child process loads and exports it under the TensorFlow backend.

    The signature `serve` takes the model's inputs by their names, with any batch size and length,
    and gives one output: `logits` for a task, `output` for anything else, as float32. Strings are
    not tokenized in it: prepare inputs with the model's preprocessor.

    A `PerformerCausalLM` has two more signatures in SavedModel and LiteRT, which generate text in
    constant memory. `prefill` reads prompts and gives the `logits` (B, vocabulary) after each row's
    last token, and the state as tensors called `state_<layer>_<name>`. `step` takes `token_ids`
    (B, 1) and that state, and gives the next `logits` and state. Where positions are learned,
    neither checks a length: beyond the last position all tokens get that. With
    attention="sliding_window" the state is the window. With attention="softmax" there is `serve`
    alone: its state would grow with the text, where a file has fixed sizes. Call `serve` on the
    whole text for each token, as the example does. An ONNX file holds one graph: `serve`.

    Where `path` is a folder, it also gets an example that needs numpy and the runtime only: run
    `python example.py --help` in it. Beside it lie `vocabulary.json` (the tokens by id) and
    `tokenizer/` (the tokenizer's own files), if the model has a preprocessor.

    **Shapes** As the model's: `token_ids` and `padding_mask` (B, T), `mask_positions` (B, P).

    **Args**
        model_or_preset: A built functional or Sequential model, or the name or folder of a preset.
        path: What to write. For LiteRT and ONNX, a path that ends in `.tflite` or `.onnx` is that
            one file; any other is a folder with `model.tflite` or `model.onnx` and the example. A
            SavedModel is always a folder; its example is in `assets.extra`. An earlier artefact
            of the same format there is replaced; anything else is left alone, with an error.
            Nothing is replaced before the new artefact is complete.
        format: `"tf_saved_model"`, `"litert"`, made of builtin LiteRT operators only, or `"onnx"`,
            of operator set 18.
        weights: How LiteRT stores the weights: `"float32"`, `"float16"` (half the size, computes in
            float32) or `"int8"` (a quarter; dynamic-range quantization, where large products are
            computed in 8 bits; tied embeddings are stored twice). Tensors of fewer than 1024
            numbers stay float32.

    **Returns** The path written.

    **Masking** As in the model: a padded token changes no other token's output.

    **Precision** That of the model; LiteRT and ONNX take float32 models only. On a small
    untrained decoder float16 weights moved the logits by up to 0.002 of their standard deviation,
    int8 weights by up to 0.1.

    **Cost** Under JAX and PyTorch a child process that imports TensorFlow, on the CPU.

    **Raises** ValueError for an unknown format, a model that is not built or has several outputs, a
    path that holds something else, a model in half precision or with operators that the format
    lacks, a custom class that the child process cannot find; TypeError if the model is no Keras
    model; ImportError where TensorFlow is not installed or, for ONNX, tf2onnx.

    **Example**

    >>> export("my-preset", "model.tflite", format="litert", weights="int8")  # doctest: +SKIP
    PosixPath('model.tflite')

    **Source** LiteRT's signatures and operator sets: https://ai.google.dev/edge/litert. ONNX comes
    from https://github.com/onnx/tensorflow-onnx.
    """
    target = Path(path)
    _check_arguments(format, weights)
    _check_packages(format)
    _check_target(target, format)
    is_preset = isinstance(model_or_preset, str | os.PathLike)
    if not is_preset:
        _check_model(model_or_preset, format)
    if keras.config.backend() == "tensorflow":
        model = _load(os.fspath(model_or_preset)) if is_preset else model_or_preset
        _check_model(model, format)
        _export_here(model, target, format, weights)
    else:
        _export_in_child(model_or_preset, target, format, weights)
    return target


# What can be refused at once.


def _check_arguments(format: str, weights: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {FORMATS}. Received: format={format!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` must be one of {WEIGHTS}. Received: weights={weights!r}")
    if weights != "float32" and format != "litert":
        raise ValueError(
            "Smaller weights are an option of LiteRT: leave weights='float32', or pass "
            f"format='litert'. Received: weights={weights!r}, format={format!r}"
        )


def _check_packages(format: str) -> None:
    needed = {"tensorflow": "tensorflow"}
    if format == "onnx":
        needed["tf2onnx"] = "'keras-performer[tensorflow,onnx]'"
    for package, source in needed.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"format={format!r} is written by {package}, which is not installed: "
                f"`pip install {source}`."
            )


def _is_file(target: Path, format: str) -> bool:
    return target.suffix == _ENDINGS.get(format)


def _check_target(target: Path, format: str) -> None:
    """Raise ValueError if `target` holds anything but an artefact of this format."""
    if not target.exists():
        return
    if _is_file(target, format):
        replaceable = target.is_file() and _is_artefact(target, format)
    else:
        names = {item.name for item in target.iterdir()} if target.is_dir() else {""}
        known = _SAVED_MODEL_FILES
        if format in _ENDINGS:
            known = {f"model{_ENDINGS[format]}", *_EXAMPLE_FILES}
        replaceable = names <= known
    if not replaceable:
        raise ValueError(
            f"`path` exists and is no earlier artefact of format={format!r}, so it is not "
            f"replaced. Choose another path, or remove it first. Received: path={str(target)!r}"
        )


def _is_artefact(file: Path, format: str) -> bool:
    with file.open("rb") as stream:
        head = stream.read(8)
    # ONNX has no magic number: a file begins with its version, a small integer of one byte.
    return head[4:8] == b"TFL3" if format == "litert" else head[:1] == b"\x08"


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
    if format in _ENDINGS and model.compute_dtype != "float32":
        raise ValueError(
            f"format={format!r} runs float32: load the preset with dtype='float32' and export "
            f"that. Received: a model with dtype policy {model.dtype_policy.name!r}"
        )


def _is_functional(model: keras.Model) -> bool:
    return any(cls.__name__ == "Functional" for cls in inspect.getmro(type(model)))


def _load(preset: str) -> keras.Model:
    """Load the task in a preset, or the backbone where there is no task."""
    import keras_performer.convert  # noqa: F401 - registers the classes that a preset names
    from keras_performer.models._load_preset import check_files, check_head

    folder = local_folder(preset)
    check_files(folder, wants_weights=True)
    file = folder / ("task.json" if (folder / "task.json").is_file() else "config.json")
    name = json.loads(file.read_text(encoding="utf-8"))["registered_name"]
    model_class = keras.saving.get_registered_object(name)
    if model_class is None:
        raise ValueError(
            f"The preset {str(folder)!r} holds a model of class {name!r}, which is not known here. "
            "Import the package that defines it, load the model, and pass the model."
        )
    try:
        model = model_class.from_preset(str(folder))
    except TypeError as error:
        raise ValueError(
            f"The preset {str(folder)!r} could not be loaded. Import the modules that define the "
            f"layers and functions of your own that are in it first. Keras said: {error}"
        ) from error
    check_head(folder, model)  # classes of keras-hub do not
    return model


# The child process: from a backend that cannot write, through a file, to TensorFlow.


def _export_in_child(model_or_preset: Any, target: Path, format: str, weights: str) -> None:
    with tempfile.TemporaryDirectory(prefix="keras_performer_export_") as scratch:
        job: dict[str, Any] = {"path": str(target), "format": format, "weights": weights}
        if isinstance(model_or_preset, keras.Model):
            job["model"] = str(Path(scratch) / "model.keras")
            model_or_preset.save(job["model"])
            with zipfile.ZipFile(job["model"]) as saved:
                configs = saved.read("config.json").decode()
        else:
            job["preset"] = os.fspath(model_or_preset)
            files = local_folder(job["preset"]).glob("*.json")
            configs = "".join(file.read_text(encoding="utf-8") for file in files)
        job["modules"] = _custom_modules(configs)
        job["error"] = str(Path(scratch) / "error.json")
        environment = {
            **os.environ,
            "KERAS_BACKEND": "tensorflow",
            # This process may hold the whole memory of the accelerator.
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }
        child = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from keras_performer.export import run_job; run_job(sys.argv[1])",
                json.dumps(job),
            ],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if child.returncode == 0:
            return
        if os.path.exists(job["error"]):
            kind, message = json.loads(Path(job["error"]).read_text(encoding="utf-8"))
            raise _FORWARDED[kind](message)
        raise RuntimeError(
            "The child process that exports under the TensorFlow backend failed with exit code "
            f"{child.returncode}. It said:\n{child.stderr[-4000:]}"
        )


def _custom_modules(configs: str) -> list[str]:
    """The modules that define what saved configs name, other than Keras's and ours."""
    modules = set(re.findall(r'"module": "([\w.]+)"', configs))
    for name, registered in keras.saving.get_custom_objects().items():
        # Functions are saved without the package that they were registered for.
        if any(f'"{known}"' in configs for known in (name, name.split(">")[-1])):
            modules.add(registered.__module__)
    ours = {"builtins", "keras", "keras_hub", "keras_performer", "tensorflow", "jax", "torch"}
    return sorted(name for name in modules if name.split(".")[0] not in ours)


def run_job(text: str) -> None:
    """Do what `_export_in_child` asks, in the child process.

    **Args**
        text: The job as JSON: a saved `model` or a `preset`, and the `modules` that it needs; and
            `path`, `format`, `weights` and the file for an `error`.

    **Raises** SystemExit with 1 after an error that the parent raises again.
    """
    job = json.loads(text)
    try:
        model = _load_with(job["modules"], preset=job.get("preset"), file=job.get("model"))
        export(model, job["path"], job["format"], weights=job["weights"])
    except tuple(_FORWARDED.values()) as error:
        kind = next(name for name, cls in _FORWARDED.items() if isinstance(error, cls))
        Path(job["error"]).write_text(json.dumps([kind, str(error)]), encoding="utf-8")
        sys.exit(1)


def _load_with(modules: list[str], preset: str | None, file: str | None) -> keras.Model:
    import keras_performer.convert  # noqa: F401 - registers its classes, and those of models

    missing = []
    for name in modules:
        # Code in `__main__` cannot be imported by its name.
        if name == "__main__" or importlib.util.find_spec(name) is None:
            missing.append(name)
        else:
            importlib.import_module(name)
    try:
        if preset is not None:
            return _load(preset)
        # Saved by the parent a moment ago, so code in it is no stranger's.
        return keras.saving.load_model(file, compile=False, safe_mode=False)
    except (TypeError, ValueError) as error:
        if not missing and preset is not None:
            raise
        raise ValueError(
            "Only TensorFlow writes this format, so a child process loads the model under the "
            "TensorFlow backend, and could not. Layers and functions of your own must be decorated "
            "with `keras.saving.register_keras_serializable`, be written with `keras.ops`, and be "
            "defined in a module that can be imported, not in a notebook or the script itself"
            + (f" (here: {', '.join(missing)})" if missing else "")
            + f". Keras said: {error}"
        ) from error


# The signatures.


def _endpoints(model: keras.Model, format: str) -> Endpoints:
    """Functions from inputs by name to outputs by name, and the inputs' specs."""
    endpoints = {"serve": _serve(model)}
    models = sys.modules.get("keras_performer.models")
    if format != "onnx" and models is not None and isinstance(model, models.PerformerCausalLM):
        causal_lm: Any = model
        if causal_lm.backbone.attention != "softmax":
            endpoints.update(_generation(causal_lm, endpoints["serve"][1]))
    return endpoints


def _serve(model: keras.Model) -> Any:
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


def _generation(model: Any, specs: dict[str, keras.InputSpec]) -> Endpoints:
    """`prefill` and `step` of a causal language model."""
    ops = keras.ops
    backbone = model.backbone
    like = model.initial_state(1)

    def flat(state: list[dict[str, Any]]) -> dict[str, Any]:
        return {f"state_{i}_{name}": x for i, part in enumerate(state) for name, x in part.items()}

    def outputs(hidden: Any, state: list[dict[str, Any]]) -> dict[str, Any]:
        logits = ops.squeeze(backbone.token_embedding(hidden, reverse=True), axis=1)
        return {"logits": ops.cast(logits, "float32"), **flat(state)}

    def prefill(inputs: dict[str, Any]) -> dict[str, Any]:
        batch, length = ops.shape(inputs["token_ids"])
        hidden, state = backbone.call_with_state(inputs, model.initial_state(batch))
        index = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
        known = ops.cast(inputs["padding_mask"], "bool")
        last = ops.max(ops.where(known, index, 0), axis=1, keepdims=True)
        is_last = ops.expand_dims(ops.equal(index, last), -1)
        picked = ops.where(is_last, hidden, ops.zeros_like(hidden))
        return outputs(ops.sum(picked, axis=1, keepdims=True), state)

    def step(inputs: dict[str, Any]) -> dict[str, Any]:
        token_ids = inputs["token_ids"]
        state = [
            {name: inputs[f"state_{i}_{name}"] for name in part} for i, part in enumerate(like)
        ]
        tokens = {"token_ids": token_ids, "padding_mask": ops.ones_like(token_ids)}
        return outputs(*backbone.call_with_state(tokens, state))

    step_specs = {
        "token_ids": keras.InputSpec(dtype="int32", shape=(None, 1), name="token_ids"),
        **{
            name: keras.InputSpec(
                dtype=keras.backend.standardize_dtype(x.dtype),
                shape=(None, *x.shape[1:]),
                name=name,
            )
            for name, x in flat(like).items()
        },
    }
    return {"prefill": (prefill, specs), "step": (step, step_specs)}


# Under TensorFlow: the files.


def _export_here(model: keras.Model, target: Path, format: str, weights: str) -> None:
    endpoints = _endpoints(model, format)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch) / "artefact"
        folder.mkdir()
        if format == "tf_saved_model":
            _write_saved_model(model, endpoints, folder)
            _write_example(model, list(endpoints), folder / "assets.extra")
            written = folder
        else:
            file = folder / f"model{_ENDINGS[format]}"
            if format == "litert":
                _write_litert(model, endpoints, file, weights, Path(scratch) / "saved_model")
            else:
                _write_onnx(*endpoints["serve"], file)
            written = file if _is_file(target, format) else folder
            if written is folder:
                _write_example(model, list(endpoints), folder)
        if target.is_dir():
            shutil.rmtree(target)
        written.replace(target)


def _write_saved_model(model: keras.Model, endpoints: Endpoints, folder: Path) -> None:
    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, (function, specs) in endpoints.items():
        archive.add_endpoint(name, function, [specs])
    archive.write_out(str(folder), verbose=False)


def _tensor_specs(specs: dict[str, keras.InputSpec]) -> dict[str, Any]:
    import tensorflow as tf

    return {
        name: tf.TensorSpec(spec.shape, spec.dtype, name=name)  # pyright: ignore[reportArgumentType]
        for name, spec in specs.items()
    }


def _write_litert(
    model: keras.Model, endpoints: Endpoints, file: Path, weights: str, scratch: Path
) -> None:
    import tensorflow as tf

    from keras_performer.ops import export_loops

    # Not `ExportArchive`: the converter renames its signatures. And a plain list of variables, for
    # it turns those into constants that are reached in no other way.
    module: Any = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    with export_loops():
        signatures = {
            name: tf.function(
                function, input_signature=[_tensor_specs(specs)], autograph=False
            ).get_concrete_function()
            for name, (function, specs) in endpoints.items()
        }
    try:
        tf.saved_model.save(module, str(scratch), signatures=signatures)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(scratch), list(endpoints))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        if weights == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        content = converter.convert()
    except Exception as error:
        raise ValueError(
            "The model needs an operator that LiteRT does not have, so it cannot be written as a "
            "LiteRT file; format='tf_saved_model' takes any model. In place of a quantized model "
            "export the one before quantization, with weights='int8'. The converter said: "
            f"{error}"
        ) from error
    file.write_bytes(_halve_weights(content) if weights == "float16" else content)


def _halve_weights(content: bytes) -> bytes:
    """Store the large float32 constants of a LiteRT file as float16.

    Not by the converter, which halves every constant: those of the algorithm, such as 2^-35, would
    become zero.
    """
    import numpy as np
    from tensorflow.lite.tools import flatbuffer_utils  # pyright: ignore[reportMissingImports]

    schema = flatbuffer_utils.schema_fb
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    dequantize = schema.OperatorCodeT()
    dequantize.builtinCode = dequantize.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    dequantize.version = 3  # the first that takes float16
    model.operatorCodes.append(dequantize)
    halved = {}
    for index, buffer in enumerate(list(model.buffers)):
        if buffer.data is not None and len(buffer.data) >= 4 * _SMALLEST_HALVED:
            with np.errstate(over="ignore", invalid="ignore"):
                halves = np.frombuffer(bytes(buffer.data), "<f4").astype("<f2")
            if np.isfinite(halves).all():
                # Another buffer, since tensors of other types may share this one.
                halved[index] = len(model.buffers)
                model.buffers.append(schema.BufferT())
                model.buffers[-1].data = halves.view("uint8")
    for subgraph in model.subgraphs:
        operators = []
        for index, tensor in enumerate(list(subgraph.tensors)):
            if tensor.type != schema.TensorType.FLOAT32 or tensor.buffer not in halved:
                continue
            half = copy.copy(tensor)
            half.type, half.buffer = schema.TensorType.FLOAT16, halved[tensor.buffer]
            half.name = bytes(tensor.name) + b"_float16"
            operator = schema.OperatorT()
            operator.opcodeIndex = len(model.operatorCodes) - 1
            operator.inputs, operator.outputs = [len(subgraph.tensors)], [index]
            operators.append(operator)
            subgraph.tensors.append(half)
            tensor.buffer = 0  # by convention empty: the operator computes the tensor
        subgraph.operators = [*operators, *subgraph.operators]
    used = {tensor.buffer for subgraph in model.subgraphs for tensor in subgraph.tensors}
    for index, half in halved.items():
        for unused in {index, half} - used:
            model.buffers[unused].data = None
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _write_onnx(
    function: Callable[[dict[str, Any]], dict[str, Any]],
    specs: dict[str, keras.InputSpec],
    file: Path,
) -> None:
    import onnx
    import tensorflow as tf
    import tf2onnx

    tensor_specs = _tensor_specs(specs)
    signature = [tensor_specs[name] for name in specs]
    graph_function = tf.function(
        lambda *tensors: function(dict(zip(specs, tensors, strict=True))),
        input_signature=signature,
        autograph=False,
    )
    try:
        # Where it cannot convert an operator it goes on, so only the checker tells.
        proto, _ = tf2onnx.convert.from_function(
            graph_function,
            input_signature=signature,
            opset=_ONNX_OPSET,
            custom_op_handlers={"Erfc": (_convert_erfc, [])},
        )
        onnx.checker.check_model(proto)
    except Exception as error:
        raise ValueError(
            "The model needs an operator that ONNX does not have, so it cannot be written as an "
            f"ONNX file; format='tf_saved_model' takes any model. The converter said: {error}"
        ) from error
    for value in proto.graph.input:
        for i, axis in enumerate(value.type.tensor_type.shape.dim):
            if not axis.dim_value:
                # Equal names promise equal sizes: of the batch only.
                axis.dim_param = f"{value.name}_axis_{i}" if i else "batch"
    onnx.save(proto, str(file))


def _convert_erfc(graph: Any, node: Any, name: str, args: Any) -> None:
    """Write erfc(x), from the exact GELU, as 1 - erf(x)."""
    import numpy as np

    del name, args
    one = graph.make_const(f"{node.name}_one", np.ones((), "float32")).output[0]
    shapes, dtypes = node.output_shapes, node.output_dtypes
    graph.remove_node(node.name)
    erf = graph.make_node("Erf", [node.input[0]])
    graph.make_node(
        "Sub",
        [one, erf.output[0]],
        outputs=node.output,
        name=node.name,
        shapes=shapes,
        dtypes=dtypes,
    )


# The example.


def _write_example(model: keras.Model, signatures: list[str], folder: Path) -> None:
    """Write `example.py` and what it reads, if the model's strings are known."""
    preprocessor = getattr(model, "preprocessor", None) if _is_task(model) else None
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None:
        return
    (folder / "tokenizer").mkdir(parents=True)
    tokenizer.save_assets(str(folder / "tokenizer"))
    size = tokenizer.vocabulary_size()
    special = {
        name: getattr(tokenizer, f"{name}_token_id", None)
        for name in ("start", "end", "pad", "mask", "unk")
    }
    facts = {
        "model": type(model).__name__,
        "signatures": signatures,
        "inputs": [tensor.name for tensor in model.inputs],
        "tokenizer": type(tokenizer).__name__,
        "k": getattr(tokenizer, "k", None),
        "stride": getattr(tokenizer, "stride", None),
        **special,
        "starts": getattr(preprocessor, "add_start_token", True),
        "tokens": [tokenizer.id_to_token(i) for i in range(size)],
    }
    text = json.dumps(facts, ensure_ascii=False, indent=1)
    (folder / "vocabulary.json").write_text(text, encoding="utf-8")
    shutil.copyfile(_EXAMPLE, folder / "example.py")


# The command line.


def main(arguments: list[str] | None = None) -> int:
    """Export a preset: `python -m keras_performer.export PRESET OUT`.

    **Args**
        arguments: Those of the command line; None takes them from there.

    **Returns** The exit code: 0, or 1 after an error, which is printed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m keras_performer.export", description="Export a preset."
    )
    parser.add_argument("preset", metavar="PRESET", help="name or folder of a preset")
    parser.add_argument("out", metavar="OUT", type=Path, help="file or folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="default: litert for OUT.tflite, onnx for OUT.onnx, else tf_saved_model",
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="float32", help="how LiteRT stores the weights"
    )
    options = parser.parse_args(arguments)
    guessed = {ending: format for format, ending in _ENDINGS.items()}
    format = options.format or guessed.get(options.out.suffix, "tf_saved_model")
    try:
        print(export(options.preset, options.out, format, weights=options.weights))
    except tuple(_FORWARDED.values()) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
