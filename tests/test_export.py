"""Every format from every backend, run by its own runtime and compared with the model."""

import contextlib
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from tolerances import to_numpy

import keras_performer
from keras_performer.export import _custom_modules, _load, _write_example, main
from keras_performer.layers import PerformerEncoderBlock
from keras_performer.models import (
    ByteTokenizer,
    DNATokenizer,
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSeq2SeqBackbone,
    PerformerSeq2SeqLM,
    PerformerSeq2SeqLMPreprocessor,
    ProteinTokenizer,
)

ROOT = Path(__file__).resolve().parent.parent
BACKEND = keras.config.backend()
PACKAGES = {
    "tf_saved_model": ["tensorflow"],
    "litert": ["tensorflow", "ai_edge_litert"],
    "onnx": ["tensorflow", "tf2onnx", "onnxruntime"],
}


def needs(format):
    missing = [name for name in PACKAGES[format] if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def each(*formats):
    return [pytest.param(format, marks=needs(format)) for format in formats]


def slow_elsewhere(*formats):
    """Slow under the other backends, where each is written by a child process of its own."""
    marks = [] if BACKEND == "tensorflow" else [pytest.mark.slow]
    return [pytest.param(format, marks=[needs(format), *marks]) for format in formats]


every_format = pytest.mark.parametrize("format", each(*PACKAGES))
saved_model, litert, onnx = (needs(format) for format in PACKAGES)
# What the child process does is what these tests see under TensorFlow.
written_here = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow writes the files")


@pytest.fixture(scope="module")
def task():
    backbone = PerformerEncoderBackbone(
        30, 1, 4, 16, 17, num_features=13, num_key_value_heads=2, gated=True, dropout=0.1
    )
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=19)
    return PerformerMaskedLM(backbone, preprocessor)


def make_causal_lm(**options):
    keras.utils.set_random_seed(7)
    options = {"num_features": 16, "seed": 1, **options}
    backbone = PerformerDecoderBackbone(30, 1, 2, 12, 17, **options)
    # Larger than at the start of training, where every prediction is a near tie.
    backbone.token_embedding.set_weights([30 * w for w in backbone.token_embedding.get_weights()])
    preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), sequence_length=16)
    model = PerformerCausalLM(backbone, preprocessor)
    model.compile(sampler="greedy")
    return model


def inputs(batch, length, places=None):
    rng = np.random.default_rng(length)
    padding_mask = np.ones((batch, length), "int32")
    padding_mask[-1, length // 2 :] = 0
    x = {
        "token_ids": rng.integers(4, 30, size=(batch, length)).astype("int32"),
        "padding_mask": padding_mask,
    }
    if places is not None:
        x["mask_positions"] = rng.integers(0, length, size=(batch, places)).astype("int32")
    return x


# The second length takes several chunks of the attention.
SIZES = [(2, 11, 3), (3, 700, 5)]


def open_artefact(path, format):
    """A function `run(signature, inputs)` over the real runtime of the format."""
    if format == "litert":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path))
        return lambda signature, x: interpreter.get_signature_runner(signature)(**x)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda signature, x: dict(zip(names, session.run(names, x), strict=True))
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))

    def run(signature, x):
        tensors = {name: tf.constant(value) for name, value in x.items()}
        by_function = getattr(loaded, signature)(tensors)
        outputs = loaded.signatures[signature](**tensors)
        assert set(outputs) == set(by_function)
        for name, value in outputs.items():
            np.testing.assert_array_equal(value.numpy(), by_function[name].numpy())
        return {name: value.numpy() for name, value in outputs.items()}

    return run


def file_name(format):
    return {"litert": "model.tflite", "onnx": "model.onnx"}.get(format, "model")


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": BACKEND, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("format", [*each("tf_saved_model", "litert"), *slow_elsewhere("onnx")])
def test_the_file_equals_the_model_at_any_size(task, format, tmp_path):
    path, source = tmp_path / "new" / file_name(format), task
    if format == "litert":
        source = str(tmp_path / "preset")
        task.save_to_preset(source)
    assert keras_performer.export(source, path, format=format) == path
    assert os.listdir(path.parent) == [path.name]
    run = open_artefact(path, format)
    for size in SIZES:
        outputs = run("serve", inputs(*size))
        assert set(outputs) == {"logits"}
        expected = to_numpy(task(inputs(*size)))
        assert expected.std() > 0.01
        np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A function from a format to a model that generates and the folder it is exported to."""
    made = {}

    def make(format):
        if format not in made:
            model, folder = make_causal_lm(), tmp_path_factory.mktemp("generator") / format
            made[format] = model, keras_performer.export(model, folder, format=format)
        return made[format]

    return make


def artefact_in(folder, format):
    return folder if format == "tf_saved_model" else folder / file_name(format)


@contextlib.contextmanager
def without_preprocessor(model):
    preprocessor, model.preprocessor = model.preprocessor, None
    yield
    model.preprocessor = preprocessor


@pytest.mark.parametrize("format", slow_elsewhere("litert"))
def test_prefill_and_step_generate_what_the_model_generates(format, generator):
    model, folder = generator(format)
    check_generation(model, open_artefact(artefact_in(folder, format), format))


@pytest.mark.slow_on_tensorflow
@written_here
@litert
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "sliding_window", "sliding_window": 5},
        {"exact_window": 3, "num_sink_tokens": 2, "far_bias": -1.0},
    ],
    ids=["sliding_window", "exact_window"],
)
def test_windows_generate_too(options, tmp_path):
    model = make_causal_lm(**options)
    path = keras_performer.export(model, tmp_path / "model.tflite", format="litert")
    check_generation(model, open_artefact(path, "litert"))


def check_generation(model, run):
    prompts = {k: to_numpy(v) for k, v in model.preprocessor.generate_preprocess(
        ["MKTAY", "M", "MKT"]
    ).items()}  # fmt: skip
    prompts = {k: np.array(v, "int32") for k, v in prompts.items()}
    lengths, end = prompts["padding_mask"].sum(1), prompts["token_ids"].shape[1]
    with without_preprocessor(model):
        expected = to_numpy(model.generate(dict(prompts), stop_token_ids=None)["token_ids"])
    short = {name: x[:, : lengths.max()] for name, x in prompts.items()}
    outputs = run("prefill", short)
    full = to_numpy(model(prompts))[np.arange(3), lengths - 1]
    np.testing.assert_allclose(outputs["logits"], full, rtol=1e-4, atol=1e-4)
    sizes = {name: x.shape for name, x in outputs.items()}
    assert "state_0_position" in sizes
    token_ids = prompts["token_ids"]
    for step in range(end - lengths.min()):
        best = outputs["logits"].argmax(-1).astype("int32")
        for row, length in enumerate(lengths):
            if length + step < end:
                token_ids[row, length + step] = best[row]
        state = {name: x for name, x in outputs.items() if name != "logits"}
        outputs = run("step", {"token_ids": best[:, None], **state})
        assert {name: x.shape for name, x in outputs.items()} == sizes
    np.testing.assert_array_equal(token_ids, expected)
    assert len(np.unique(expected)) > 5
    # A batch of one, from the same file.
    alone = run("prefill", {name: x[:1, :4] for name, x in prompts.items()})
    alone.pop("logits")
    outputs = run("step", {"token_ids": prompts["token_ids"][:1, 4:5], **alone})
    first = to_numpy(model({name: x[:1, :5] for name, x in prompts.items()}))[:, -1]
    np.testing.assert_allclose(outputs["logits"], first, rtol=1e-4, atol=1e-4)


@pytest.mark.slow_on_tensorflow
@written_here
@onnx
@pytest.mark.parametrize("attention", ["softmax", "sliding_window"])
def test_a_causal_model_as_onnx(attention, tmp_path):
    window = 5 if attention == "sliding_window" else None
    model = make_causal_lm(attention=attention, sliding_window=window)
    path = keras_performer.export(model, tmp_path / "model.onnx", format="onnx")
    for size in ((2, 11), (1, 300)):
        outputs = open_artefact(path, "onnx")("serve", inputs(*size))["logits"]
        expected = to_numpy(model(inputs(*size)))
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


@written_here
@litert
def test_softmax_attention_has_no_state_of_fixed_size(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model = make_causal_lm(attention="softmax")
    folder = keras_performer.export(model, tmp_path / "model", format="litert")
    assert set(Interpreter(str(folder / "model.tflite")).get_signature_list()) == {"serve"}
    text = run_example(folder, "MKT", "--tokens", "12", forbidden=[*OURS, "tensorflow"])
    assert text.strip() == model.generate(["MKT"], strip_prompt=True)[0]


@pytest.mark.slow_on_tensorflow
@written_here
@litert
def test_smaller_weights(tmp_path):
    """The largest difference of the logits, in their standard deviations."""
    keras.utils.set_random_seed(1)
    backbone = PerformerDecoderBackbone(999, 1, 4, 128, 256, num_features=64, tie_weights=False)
    backbone.token_embedding.set_weights([20 * w for w in backbone.token_embedding.get_weights()])
    model = PerformerCausalLM(backbone)
    x = inputs(2, 151)
    x["padding_mask"][:] = 1
    expected = to_numpy(model(x))
    prompt = {name: array[:, :150] for name, array in x.items()}
    sizes = {}
    for weights, tolerance in (("float16", 5e-3), ("int8", 0.25)):
        path = tmp_path / f"{weights}.tflite"
        keras_performer.export(model, path, format="litert", weights=weights)
        sizes[weights] = path.stat().st_size
        run = open_artefact(path, "litert")
        state = run("prefill", prompt)
        last = state.pop("logits")
        stepped = run("step", {"token_ids": x["token_ids"][:, 150:], **state})["logits"]
        served = run("serve", x)["logits"]
        for output, place in ((served, slice(None)), (last, 149), (stepped, 150)):
            largest = np.abs(output - expected[:, place]).max() / expected.std()
            assert tolerance / 100 < largest < tolerance, weights
    parameters = sum(weight.size for weight in map(np.array, model.get_weights()))
    assert sizes["float16"] - sizes["int8"] > 0.75 * parameters


@written_here
@saved_model
def test_plain_models_give_an_output(tmp_path):
    block = PerformerEncoderBlock(2, 9, num_features=7)
    model = keras.Sequential([keras.Input((None, 8), name="frames"), block])
    keras_performer.export(model, tmp_path / "deep" / "model", format="tf_saved_model")
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    run = open_artefact(tmp_path / "deep" / "model", "tf_saved_model")
    outputs = run("serve", {"frames": x})
    assert not (tmp_path / "deep" / "model" / "assets.extra").exists()
    np.testing.assert_allclose(outputs["output"], to_numpy(model(x)), rtol=1e-4, atol=1e-5)


@keras.saving.register_keras_serializable(package="test_export")
class Doubled(keras.layers.Layer):
    def call(self, inputs):
        return 2 * inputs


@keras.saving.register_keras_serializable(package="test_export")
def halved(x):
    return x / 2


@pytest.mark.slow_on_torch
@pytest.mark.slow_on_jax
@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow needs no child process")
@saved_model
def test_custom_layers_of_modules_reach_the_child_process_and_others_are_explained(tmp_path):
    @keras.saving.register_keras_serializable(package="test_export")
    class Hidden(keras.layers.Layer):
        def call(self, inputs):
            return 3 * inputs

    Hidden.__module__ = "__main__"
    x = np.ones((2, 3), "float32")
    for layer in (Doubled(), Hidden()):
        dense = keras.layers.Dense(2, activation=halved)
        model = keras.Sequential([keras.Input((3,), name="x"), dense, layer])
        if isinstance(layer, Doubled):
            run = open_artefact(keras_performer.export(model, tmp_path / "model"), "tf_saved_model")
            output = run("serve", {"x": x})["output"]
            np.testing.assert_allclose(output, to_numpy(model(x)), rtol=1e-5, atol=1e-6)
            continue
        with pytest.raises(ValueError, match=r"(?s)module that can be imported.*__main__.*Hidden"):
            keras_performer.export(model, tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]


def test_a_preset_with_code_that_is_not_known_here_is_explained(tmp_path, monkeypatch):
    model = make_causal_lm(activation=halved)
    model.save_to_preset(str(tmp_path / "preset"))
    configs = (tmp_path / "preset" / "config.json").read_text(encoding="utf-8")
    assert _custom_modules(configs) == ["test_export"]
    monkeypatch.delitem(keras.saving.get_custom_objects(), "test_export>halved")
    assert _custom_modules(configs.replace("test_export", "builtins")) == []
    with pytest.raises(ValueError, match="Import the modules that define the layers and functions"):
        _load(str(tmp_path / "preset"))


def test_tensorflow_must_be_installed(task, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    absent = {"tensorflow"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a)
    )
    with pytest.raises(ImportError, match="pip install tensorflow"):
        keras_performer.export(task, tmp_path / "model")
    absent.clear()
    absent.add("tf2onnx")
    with pytest.raises(ImportError, match="onnx"):
        keras_performer.export(task, tmp_path / "model", format="onnx")
    assert os.listdir(tmp_path) == []


@saved_model
def test_a_child_process_that_dies_says_what_it_said(monkeypatch, task, tmp_path):
    if BACKEND == "tensorflow":
        pytest.skip("TensorFlow needs no child process")
    # An interpreter that fails before it reaches this package.
    monkeypatch.setattr(sys, "path", [str(tmp_path / "broken"), *sys.path])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "keras.py").write_text("raise SystemExit('out of order')")
    with pytest.raises(RuntimeError, match=r"(?s)child process.*out of order"):
        keras_performer.export(task, tmp_path / "model")


@written_here
@saved_model
def test_earlier_artefacts_are_replaced_and_nothing_else(tmp_path):
    first, second = (
        keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)]) for _ in range(2)
    )
    path = tmp_path / "model"
    x = np.ones((1, 3), "float32")
    for model in (first, second):
        keras_performer.export(model, path)
        outputs = open_artefact(path, "tf_saved_model")("serve", {"x": x})
        np.testing.assert_allclose(outputs["output"], to_numpy(model(x)), rtol=1e-5, atol=1e-6)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no earlier artefact.*path="):
        keras_performer.export(first, path)
    assert (path / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="no earlier artefact"):
        keras_performer.export(first, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@written_here
@pytest.mark.parametrize("format", each("litert", "onnx"))
def test_files_and_folders_of_one_format_replace_their_like_only(format, tmp_path):
    model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])
    name = file_name(format)
    for path in (tmp_path / name, tmp_path / "folder"):
        for _ in range(2):
            keras_performer.export(model, path, format=format)
    assert os.listdir(tmp_path / "folder") == [name]
    other = tmp_path / "mine" / name
    other.parent.mkdir()
    other.write_text("mine, and longer than the magic number")
    for path in (other, tmp_path):
        with pytest.raises(ValueError, match="no earlier artefact"):
            keras_performer.export(model, path, format=format)


@written_here
@pytest.mark.parametrize("format", each("litert", "onnx"))
def test_operators_that_the_format_lacks_are_refused(format, tmp_path):
    class Digamma(keras.layers.Layer):
        def call(self, inputs):
            import tensorflow as tf

            return tf.math.digamma(inputs)

    model = keras.Sequential([keras.Input((3,), name="x"), Digamma()])
    path = tmp_path / file_name(format)
    earlier = b"\x08000TFL3 an earlier one"
    path.write_bytes(earlier)
    with pytest.raises(ValueError, match=r"(?s)operator that (LiteRT|ONNX) does not .*Digamma"):
        keras_performer.export(model, path, format=format)
    assert path.read_bytes() == earlier
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("format", each("litert", "onnx"))
def test_half_precision_is_refused(format, tmp_path):
    backbone = PerformerEncoderBackbone(30, 1, 1, 4, 4, num_features=7, dtype="mixed_bfloat16")
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        keras_performer.export(backbone, tmp_path / file_name(format), format=format)


@pytest.mark.slow_on_torch
@pytest.mark.slow_on_jax
@saved_model
def test_what_cannot_be_exported_is_explained(tmp_path):
    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    (damaged / "model.weights.h5").write_text("")
    x = keras.Input((3,))
    cases = [
        (keras.Sequential([keras.layers.Dense(2)]), ValueError, "not built"),
        (keras.Model(x, [x + 1, x + 2]), ValueError, "2 outputs"),
        (keras.layers.Dense(2), TypeError, "of type Dense"),
        (damaged, ValueError, r"config\.json' is not valid JSON"),
    ]
    if BACKEND == "tensorflow":  # else one child process shows it
        cases.append(("no-such-preset", ValueError, "name='no-such-preset'"))
    subclassed = Subclassed()
    subclassed(np.ones((1, 3)))
    cases.append((subclassed, ValueError, "of type Subclassed"))
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            keras_performer.export(model, tmp_path / "model")
        assert os.listdir(tmp_path) == ["damaged"]


def test_arguments_are_checked(task, tmp_path):
    for options, message in (
        ({"format": "tar"}, "format='tar'"),
        ({"format": "litert", "weights": "int4"}, "weights='int4'"),
        ({"format": "tf_saved_model", "weights": "int8"}, "weights='int8', format='tf_saved"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_performer.export(task, tmp_path / "model", **options)


# The example beside the model.


def run_example(folder, *arguments, forbidden):
    """Run it where the forbidden packages cannot be imported."""
    script = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); "
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    result = python("-c", script, ",".join(forbidden), str(folder / "example.py"), *arguments)
    assert result.returncode == 0, result.stderr
    assert "mismatch" not in result.stderr  # onnxruntime's warning about axes
    return result.stdout


OURS = ["keras_performer", "keras", "keras_hub", "jax", "torch"]


@written_here
@every_format
def test_the_example_generates_without_this_package(format, generator):
    model, folder = generator(format)
    forbidden = OURS
    if format == "tf_saved_model":
        folder = folder / "assets.extra"
        assert (folder / "tokenizer" / "vocabulary.txt").is_file()
    else:
        files = {"example.py", file_name(format), "tokenizer", "vocabulary.json"}
        assert set(os.listdir(folder)) == files
        forbidden = [*OURS, "tensorflow"]
    text = run_example(folder, "MKT", "--tokens", "12", forbidden=forbidden)
    expected = model.generate(["MKT"], strip_prompt=True)[0]
    assert text.strip() == expected and len(expected) > 4


@written_here
@litert
def test_the_example_fills_masks(task, tmp_path):
    for _ in range(2):  # a folder with an example is replaced as any other is
        folder = keras_performer.export(task, tmp_path / "model", format="litert")
    output = run_example(folder, "MK<mask>A", forbidden=[*OURS, "tensorflow"])
    ids = np.array([[1, 15, 13, 3, 5, 2]])
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids), "mask_positions": np.array([[3]])}
    best = int(to_numpy(task(x))[0, 0].argmax())
    assert output.startswith(f"place 3: {ProteinTokenizer().id_to_token(best)!r} 0.")
    assert run_example(folder, forbidden=[*OURS, "tensorflow"]).startswith("place 1: ")


@pytest.mark.slow_on_tensorflow
@written_here
@onnx
def test_the_example_of_an_encoder_decoder_has_texts_of_two_lengths(tmp_path):
    backbone = PerformerSeq2SeqBackbone(30, 1, 2, 12, 17, num_features=16)
    model = PerformerSeq2SeqLM(backbone, PerformerSeq2SeqLMPreprocessor(ProteinTokenizer()))
    folder = keras_performer.export(model, tmp_path / "model", format="onnx")
    sides = {"encoder": inputs(2, 7), "decoder": inputs(2, 5)}
    x = {f"{side}_{name}": array for side, part in sides.items() for name, array in part.items()}
    outputs = open_artefact(folder / "model.onnx", "onnx")("serve", x)["logits"]
    np.testing.assert_allclose(outputs, to_numpy(model(x)), rtol=1e-5, atol=1e-5)
    text = run_example(folder, "MKTAYIA", "--tokens", "4", forbidden=[*OURS, "tensorflow"])
    assert len(text.strip()) >= 1


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (ProteinTokenizer(), "MKtZ?é"),
        (ByteTokenizer(), "Aé\n!"),
        (DNATokenizer(k=1), "ACGNt"),
        (DNATokenizer(k=3), "ACGTNAGTCTC"),
        (DNATokenizer(k=3, stride=2), "ACGTNAGTCTC"),
    ],
)
def test_the_example_tokenizes_as_the_tokenizer_does(tokenizer, text, tmp_path):
    backbone = PerformerDecoderBackbone(tokenizer.vocabulary_size(), 1, 1, 4, 4, num_features=7)
    model = PerformerCausalLM(backbone, PerformerCausalLMPreprocessor(tokenizer))
    _write_example(model, ["serve"], tmp_path)
    example = runpy.run_path(str(tmp_path / "example.py"))
    ids = [int(i) for i in tokenizer(text)]
    assert example["encode"](text) == ids
    with contextlib.suppress(ValueError):  # k-mers that overlap have no text
        assert example["decode"]([1, *ids, 2, 0]) == tokenizer.detokenize(ids)
    facts = json.loads((tmp_path / "vocabulary.json").read_text(encoding="utf-8"))
    assert facts["tokens"] == tokenizer.get_vocabulary()


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        (["token_ids", "mask_positions"], {"token_ids": (1, 4)}),  # as of ESM
        (
            ["token_ids", "segment_ids", "padding_mask"],  # as of BERT
            {"token_ids": (1, 4), "segment_ids": (1, 4), "padding_mask": (1, 4)},
        ),
    ],
)
def test_the_example_gives_converted_models_their_inputs(names, shapes, tmp_path, capsys):
    backbone = PerformerEncoderBackbone(30, 1, 1, 4, 4, num_features=7)
    _write_example(
        PerformerMaskedLM(backbone, PerformerMaskedLMPreprocessor(ProteinTokenizer())),
        ["serve"],
        tmp_path,
    )
    path = tmp_path / "vocabulary.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**facts, "inputs": names}), encoding="utf-8")
    example = runpy.run_path(str(tmp_path / "example.py"))
    x = example["inputs"]([5, 3, 6, 7], [])
    assert {name: array.shape for name, array in x.items()} == shapes
    assert not x.get("segment_ids", np.zeros(1)).any()
    given = {}

    def run(signature, x):
        given.update(x)
        return {"logits": np.zeros((1, 1, 30), "float32")}

    if "mask_positions" in names:
        example["fill_masks"](run, [5, 3, 6, 7])
        assert sorted(given) == sorted(names)
        assert capsys.readouterr().out.startswith("place 1:")


# The command line.


@written_here
@litert
def test_the_command_line(task, tmp_path):
    task.save_to_preset(str(tmp_path / "preset"))
    out = tmp_path / "model.tflite"
    result = python("-m", "keras_performer.export", str(tmp_path / "preset"), str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(out)
    outputs = open_artefact(out, "litert")("serve", inputs(*SIZES[0]))
    expected = to_numpy(task(inputs(*SIZES[0])))
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-5, atol=1e-5)


def test_the_command_line_guesses_the_format_and_explains_errors(monkeypatch, capsys, tmp_path):
    calls = []

    def record(preset, path, format, *, weights):
        calls.append((preset, format, weights))
        raise ValueError("no such thing")

    module = sys.modules["keras_performer.export"]
    monkeypatch.setattr(module, "export", record)
    for out in ("m.tflite", "m.onnx", "m"):
        assert main(["p", str(tmp_path / out), "--weights", "int8"]) == 1
    assert main(["p", str(tmp_path / "folder"), "--format", "litert"]) == 1
    formats = ("litert", "onnx", "tf_saved_model")
    assert calls == [*(("p", format, "int8") for format in formats), ("p", "litert", "float32")]
    assert capsys.readouterr().err.startswith("error: no such thing")
