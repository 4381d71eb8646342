import importlib.util
import os

import keras
import numpy as np
import pytest

import keras_performer
from keras_performer.layers import PerformerEncoderBlock
from keras_performer.models import (
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    ProteinTokenizer,
)

BACKEND = keras.config.backend()
HAS_LITERT = importlib.util.find_spec("ai_edge_litert") is not None
saved_model = pytest.mark.skipif(
    BACKEND == "torch" or importlib.util.find_spec("tensorflow") is None,
    reason="needs the TensorFlow or JAX backend, and TensorFlow",
)
litert = pytest.mark.skipif(BACKEND != "tensorflow" or not HAS_LITERT, reason="needs TensorFlow")


@pytest.fixture(scope="module")
def task():
    backbone = PerformerEncoderBackbone(
        30, 1, 4, 16, 17, num_features=13, num_key_value_heads=2, gated=True, dropout=0.1
    )
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=19)
    return PerformerMaskedLM(backbone, preprocessor)


def inputs(batch, length, places):
    rng = np.random.default_rng(length)
    padding_mask = np.ones((batch, length), "int32")
    padding_mask[-1, length // 2 :] = 0
    return {
        "token_ids": rng.integers(0, 30, size=(batch, length)).astype("int32"),
        "padding_mask": padding_mask,
        "mask_positions": rng.integers(0, length, size=(batch, places)).astype("int32"),
    }


# The second length takes several chunks of the attention.
SIZES = [(2, 11, 3), (3, 700, 5)]


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def serve(path, x):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    signature = loaded.signatures["serving_default"]
    by_signature = signature(**{name: tf.constant(value) for name, value in x.items()})
    by_function = loaded.serve(x)
    assert set(by_signature) == set(by_function)
    for name, value in by_signature.items():
        np.testing.assert_array_equal(value.numpy(), by_function[name].numpy())
    return {name: value.numpy() for name, value in by_signature.items()}


def interpret(path, x):
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner("serve")
    return runner(**x)


@saved_model
def test_saved_model_of_a_preset_equals_the_model_at_any_size(task, tmp_path):
    task.save_to_preset(str(tmp_path / "preset"))
    exported = keras_performer.export(str(tmp_path / "preset"), tmp_path / "model")
    assert exported == tmp_path / "model"
    assert sorted(os.listdir(tmp_path)) == ["model", "preset"]
    for size in SIZES:
        outputs = serve(tmp_path / "model", inputs(*size))
        assert set(outputs) == {"logits"}
        expected = to_numpy(task(inputs(*size)))
        np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)


@litert
def test_litert_equals_the_model_at_any_size(task, tmp_path):
    path = tmp_path / "model.tflite"
    assert keras_performer.export(task, path, format="litert") == path
    assert sorted(os.listdir(tmp_path)) == ["model.tflite"]
    for size in SIZES:
        outputs = interpret(path, inputs(*size))
        assert set(outputs) == {"logits"}
        expected = to_numpy(task(inputs(*size)))
        np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-5)


@saved_model
def test_plain_models_give_an_output(tmp_path):
    block = PerformerEncoderBlock(2, 9, num_features=7)
    model = keras.Sequential([keras.Input((None, 8), name="frames"), block])
    keras_performer.export(model, tmp_path / "deep" / "model", format="tf_saved_model")
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    outputs = serve(tmp_path / "deep" / "model", {"frames": x})
    np.testing.assert_allclose(outputs["output"], to_numpy(model(x)), rtol=1e-4, atol=1e-5)


@saved_model
def test_earlier_artefacts_are_replaced_and_nothing_else(tmp_path):
    first, second = (
        keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)]) for _ in range(2)
    )
    path = tmp_path / "model"
    x = np.ones((1, 3), "float32")
    for model in (first, second):
        keras_performer.export(model, path)
        np.testing.assert_allclose(
            serve(path, {"x": x})["output"], to_numpy(model(x)), rtol=1e-5, atol=1e-6
        )
    (path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no earlier artefact.*path="):
        keras_performer.export(first, path)
    assert (path / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="no earlier artefact"):
        keras_performer.export(first, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@litert
def test_litert_replaces_litert_only(tmp_path):
    model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2)])
    for _ in range(2):
        keras_performer.export(model, tmp_path / "model.tflite", format="litert")
    (tmp_path / "notes.txt").write_text("mine, and longer than the magic number")
    for path in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(ValueError, match="no earlier artefact"):
            keras_performer.export(model, path, format="litert")


@litert
def test_operators_beyond_the_builtin_ones_are_refused(tmp_path):
    class Digamma(keras.layers.Layer):
        def call(self, inputs):
            import tensorflow as tf

            return tf.math.digamma(inputs)

    model = keras.Sequential([keras.Input((3,), name="x"), Digamma()])
    path = tmp_path / "model.tflite"
    path.write_bytes(b"0000TFL3 an earlier one")
    with pytest.raises(ValueError, match=r"(?s)operator that LiteRT does not have.*Digamma"):
        keras_performer.export(model, path, format="litert")
    assert path.read_bytes() == b"0000TFL3 an earlier one"
    assert os.listdir(tmp_path) == ["model.tflite"]


@litert
def test_half_precision_is_refused_for_litert(tmp_path):
    backbone = PerformerEncoderBackbone(30, 1, 1, 4, 4, num_features=7, dtype="mixed_bfloat16")
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        keras_performer.export(backbone, tmp_path / "model.tflite", format="litert")


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
        ("no-such-preset", ValueError, "name='no-such-preset'"),
        (damaged, ValueError, r"config\.json' is not valid JSON"),
    ]
    subclassed = Subclassed()
    subclassed(np.ones((1, 3)))
    cases.append((subclassed, ValueError, "of type Subclassed"))
    for model, error, message in cases:
        with pytest.raises(error, match=message):
            keras_performer.export(model, tmp_path / "model")
        assert os.listdir(tmp_path) == ["damaged"]


def test_unknown_format_is_named(task, tmp_path):
    with pytest.raises(ValueError, match="format='onnx'"):
        keras_performer.export(task, tmp_path / "model", format="onnx")


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow writes both")
def test_backends_that_cannot_write_say_where_it_works(task, tmp_path):
    formats = ["litert"] if BACKEND == "jax" else ["tf_saved_model", "litert"]
    for format in formats:
        with pytest.raises(NotImplementedError, match="KERAS_BACKEND=tensorflow"):
            keras_performer.export(task, tmp_path / "model", format=format)
    assert os.listdir(tmp_path) == []
