import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from marks import slow_where_compiled
from processes import run_code
from tolerances import to_numpy

import keras_performer
from keras_performer.convert import (
    PerformerPytorchBackbone,
    PerformerPytorchLM,
    hub_models,
    performerize,
)
from keras_performer.export import _load
from keras_performer.feature_maps import FavorPlusPlus
from keras_performer.models import (
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSequenceClassifier,
    PerformerSequenceClassifierPreprocessor,
    PerformerTokenClassifier,
    PerformerTokenClassifierPreprocessor,
    ProteinTokenizer,
)

BACKEND = keras.config.backend()
ROOT = Path(keras_performer.__file__).parents[1]
PRESETS_MODULE = importlib.import_module("keras_performer.presets")


def make_task():
    backbone = PerformerEncoderBackbone(30, 1, 3, 12, 17, num_features=13)
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=19)
    return PerformerMaskedLM(backbone, preprocessor)


def masked_inputs():
    rng = np.random.default_rng(0)
    return {
        "token_ids": rng.integers(0, 30, size=(2, 11)).astype("int32"),
        "padding_mask": np.array([[1] * 11, [1] * 7 + [0] * 4], "int32"),
        "mask_positions": np.array([[1, 4, 0], [2, 5, 6]], "int32"),
    }


def describe(folder):
    """Write what makes a folder of the zoo a preset that is found by name."""
    weights = {"parameters": 5, "bytes": 10}
    record = {"task": "PerformerMaskedLM", "summary": "Tiny.", "weights": weights, "metrics": []}
    (folder / "metrics.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A preset in a zoo, and the outputs of the task and of its backbone."""
    task = make_task()
    folder = tmp_path_factory.mktemp("zoo") / "tiny-protein"
    task.save_to_preset(str(folder))
    describe(folder)
    x = masked_inputs()
    hidden = task.backbone({name: x[name] for name in ("token_ids", "padding_mask")})
    return folder, to_numpy(task(x)), to_numpy(hidden)


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the preset to damage."""
    folder = tmp_path / "preset"
    for path in saved[0].rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(saved[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("cls", [PerformerMaskedLM, keras_hub.models.MaskedLM])
def test_task_loads_bit_equal(cls, saved):
    task = cls.from_preset(str(saved[0]))
    assert type(task) is PerformerMaskedLM
    np.testing.assert_array_equal(to_numpy(task(masked_inputs())), saved[1])
    assert task.preprocessor is not None
    assert task.preprocessor.sequence_length == 19
    assert np.isfinite(task.evaluate(["MKTAY", "ACD"], verbose=0)[0])


@pytest.mark.parametrize("cls", [PerformerEncoderBackbone, keras_hub.models.Backbone])
def test_backbone_loads_bit_equal(cls, saved):
    backbone = cls.from_preset(str(saved[0]))
    assert type(backbone) is PerformerEncoderBackbone
    x = masked_inputs()
    del x["mask_positions"]
    np.testing.assert_array_equal(to_numpy(backbone(x)), saved[2])


def test_preprocessor_and_tokenizer_load(saved):
    for cls in (PerformerMaskedLMPreprocessor, keras_hub.models.MaskedLMPreprocessor):
        assert cls.from_preset(str(saved[0])).sequence_length == 19
    for cls in (ProteinTokenizer, keras_hub.models.Tokenizer):
        assert cls.from_preset(str(saved[0]))("MK").tolist() == [15, 13]


def test_options_override_what_was_saved(saved):
    task = PerformerMaskedLM.from_preset(saved[0], preprocessor=None, dtype="mixed_bfloat16")
    assert task.preprocessor is None
    assert task.backbone.dtype_policy.name == "mixed_bfloat16"
    fresh = PerformerMaskedLM.from_preset(saved[0], load_weights=False)
    assert np.abs(to_numpy(fresh(masked_inputs())) - saved[1]).max() > 1e-3


def test_what_was_saved_in_mixed_precision_loads_in_that_of_keras(tmp_path):
    task = make_task()
    mixed = type(task.backbone).from_config(
        {**task.backbone.get_config(), "dtype": "mixed_bfloat16"}
    )
    mixed.set_weights(task.backbone.get_weights())
    mixed.save_to_preset(str(tmp_path / "mixed"))
    loaded = type(mixed).from_preset(str(tmp_path / "mixed"))
    assert loaded.dtype_policy.name == "float32"
    for weight, expected in zip(loaded.weights, task.backbone.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), to_numpy(expected))
    loaded = type(mixed).from_preset(str(tmp_path / "mixed"), dtype="mixed_bfloat16")
    assert loaded.dtype_policy.name == "mixed_bfloat16"


def test_a_head_can_be_started_on_a_backbone_alone(tmp_path):
    backbone = PerformerEncoderBackbone(30, 1, 1, 4, 4, num_features=8)
    backbone.save_to_preset(str(tmp_path / "body"))
    task = PerformerMaskedLM.from_preset(str(tmp_path / "body"), preprocessor=None)
    for new, old in zip(task.backbone.weights, backbone.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))


def test_presets_are_found_by_name_in_the_package_and_beside_it(saved, tmp_path, monkeypatch):
    inside = tmp_path / "_zoo"
    (inside / "other").mkdir(parents=True)
    describe(inside / "other")
    (inside / "no-preset").mkdir()
    beside = tmp_path / "zoo"
    (beside / "other").mkdir(parents=True)
    describe(beside / "other")
    shutil.copytree(saved[0], beside / "tiny-protein")
    monkeypatch.setattr(PRESETS_MODULE, "_ZOOS", (inside, beside))
    assert list(keras_performer.presets()) == ["other", "tiny-protein"]
    assert keras_performer.preset_path("tiny-protein") == str(beside / "tiny-protein")
    assert keras_performer.preset_path("other") == str(inside / "other")
    task = PerformerMaskedLM.from_preset("tiny-protein")
    np.testing.assert_array_equal(to_numpy(task(masked_inputs())), saved[1])
    assert ProteinTokenizer.from_preset("tiny-protein").vocabulary_size() == 30
    for name in ("no-preset", "../zoo0/tiny-protein", ""):
        with pytest.raises(ValueError, match="other, tiny-protein"):
            keras_performer.preset_path(name)
    with pytest.raises(ValueError, match=r"name='tiny-protien'"):
        PerformerMaskedLM.from_preset("tiny-protien")


def test_the_package_looks_in_its_own_folder_and_beside_it():
    package = Path(keras_performer.__file__).resolve().parent
    assert list(PRESETS_MODULE._ZOOS) == [package / "_zoo", package.parent / "zoo"]


DAMAGE = {
    "config.json is missing": ("config.json", None),
    "config.json is cut short": ("config.json", 0.5),
    "task.json is cut short": ("task.json", 0.9),
    "preprocessor.json is empty": ("preprocessor.json", 0.0),
    "weights are missing": ("model.weights.h5", None),
    "weights are cut short": ("model.weights.h5", 0.7),
    "weights are empty": ("model.weights.h5", 0.0),
    "the head's weights are missing": ("task.weights.h5", None),
    "the head's weights are cut short": ("task.weights.h5", 0.7),
    "the vocabulary is missing": ("assets/tokenizer/vocabulary.txt", None),
    "the vocabulary is cut short": ("assets/tokenizer/vocabulary.txt", 0.1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_presets_name_the_file(case, copy):
    name, share = DAMAGE[case]
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if share is not None:
        path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        PerformerMaskedLM.from_preset(copy)
    assert type(caught.value) is ValueError


def test_garbage_in_the_weights_names_the_file(copy):
    path = copy / "model.weights.h5"
    content = bytearray(path.read_bytes())
    content[: len(content) // 2] = b"\x07" * (len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.weights\.h5.*save_to_preset"):
        PerformerEncoderBackbone.from_preset(copy)


def test_weights_of_another_architecture_are_refused(copy):
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"num_layers": 1', '"num_layers": 2'))
    with pytest.raises(ValueError, match="could not be loaded"):
        PerformerEncoderBackbone.from_preset(copy)


def test_weights_are_needed_only_where_they_are_loaded(copy):
    (copy / "model.weights.h5").unlink()
    PerformerEncoderBackbone.from_preset(copy, load_weights=False)
    PerformerEncoderBackbone.from_preset(copy, False)
    ProteinTokenizer.from_preset(copy)


CONVERTED = [*hub_models.BACKBONES.values(), *hub_models.TASKS.values()]


@pytest.mark.parametrize("cls", CONVERTED)
def test_converted_classes_look_names_up_and_check_files(cls, tmp_path):
    with pytest.raises(ValueError, match="name='no-such-preset'"):
        cls.from_preset("no-such-preset")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.weights.h5").write_text("")
    with pytest.raises(ValueError, match=r"config\.json' is not valid JSON"):
        cls.from_preset(tmp_path)


@pytest.mark.slow_on_jax
def test_a_converted_task_loads_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(PRESETS_MODULE, "_ZOOS", (tmp_path,))
    backbone = keras_hub.models.BertBackbone(30, 1, 2, 8, 9, max_sequence_length=11)
    task = performerize(keras_hub.models.BertMaskedLM(backbone), num_features=7)
    task.save_to_preset(str(tmp_path / "tiny-bert"))
    describe(tmp_path / "tiny-bert")
    loaded = hub_models.TASKS[keras_hub.models.BertMaskedLM].from_preset(
        "tiny-bert", preprocessor=None
    )
    assert type(loaded) is type(task)
    for new, old in zip(loaded.weights, task.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))
    body = hub_models.PerformerBertBackbone.from_preset("tiny-bert")
    assert body.count_params() == task.backbone.count_params()
    (tmp_path / "tiny-bert" / "task.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"task\.weights\.h5' is missing"):
        type(task).from_preset("tiny-bert", preprocessor=None)


def test_a_head_can_be_started_on_a_task_without_one(tmp_path):
    decoder = PerformerDecoderBackbone(30, 1, 1, 4, 4, num_features=8)
    preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), 19)
    PerformerCausalLM(decoder, preprocessor).save_to_preset(str(tmp_path))
    for cls in (PerformerSequenceClassifier, PerformerTokenClassifier):
        task = cls.from_preset(tmp_path, num_classes=3)
        assert isinstance(task, cls) and task.num_classes == 3
        for new, old in zip(task.backbone.weights, decoder.weights, strict=True):
            np.testing.assert_array_equal(to_numpy(new), to_numpy(old))


def test_a_head_that_is_replaced_or_has_no_weights_is_not_missing(tmp_path):
    encoder = PerformerEncoderBackbone(30, 1, 1, 4, 4, num_features=8)
    PerformerTokenClassifier(encoder, 3).save_to_preset(str(tmp_path / "labels"))
    (tmp_path / "labels" / "task.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"task\.weights\.h5' is missing"):
        PerformerTokenClassifier.from_preset(tmp_path / "labels")
    PerformerTokenClassifier.from_preset(tmp_path / "labels", num_classes=2)
    PerformerTokenClassifier.from_preset(tmp_path / "labels", load_weights=False)
    backbone = PerformerPytorchBackbone(7, 9, 1, 2, 8, 4, 16)
    PerformerPytorchLM(backbone, tie_weights=True).save_to_preset(str(tmp_path / "tied"))
    assert isinstance(_load(str(tmp_path / "tied")), PerformerPytorchLM)


def test_a_preprocessor_loads_from_the_preset_of_any_backbone(tmp_path):
    decoder = PerformerDecoderBackbone(30, 1, 1, 4, 4, num_features=8)
    for cls, task_class in (
        (PerformerSequenceClassifierPreprocessor, PerformerSequenceClassifier),
        (PerformerTokenClassifierPreprocessor, PerformerTokenClassifier),
    ):
        folder = tmp_path / cls.__name__
        task_class(decoder, 2, cls(ProteinTokenizer(), 19)).save_to_preset(str(folder))
        assert cls.from_preset(folder).sequence_length == 19
        assert cls.from_preset(folder, sequence_length=7).sequence_length == 7
        # Another's are made anew around its tokenizer.
        assert PerformerMaskedLMPreprocessor.from_preset(folder).sequence_length == 512


def quantized(kind):
    """A task with a head, its backbone and its head in int8."""
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 9}
    if kind == "converted":
        backbone = keras_hub.models.RobertaBackbone(30, **sizes, max_sequence_length=11)
        task = performerize(keras_hub.models.RobertaMaskedLM(backbone), num_features=7)
    elif kind == "PerformerMaskedLM":
        task = make_task()
    else:
        backbone = PerformerDecoderBackbone(30, **sizes, num_features=7)
        preprocessor = PerformerTokenClassifierPreprocessor(ProteinTokenizer(), 19)
        task = PerformerTokenClassifier(backbone, 3, preprocessor)
    task.quantize("int8")
    return task


@pytest.mark.slow_on_torch
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("PerformerTokenClassifier", marks=pytest.mark.slow_on_tensorflow),
        *slow_where_compiled("PerformerMaskedLM", "converted"),
    ],
)
def test_quantized_tasks_come_back(kind, tmp_path):
    task = quantized(kind)
    modes = [layer.quantization_mode for layer in task._flatten_layers()]
    inputs = masked_inputs() if task.input.keys() == masked_inputs().keys() else token_inputs()
    expected = to_numpy(task(inputs))
    options = {"preprocessor": None} if task.preprocessor is None else {}
    task.save_to_preset(str(tmp_path / "preset"))
    loaded = type(task).from_preset(tmp_path / "preset", **options)
    # What was loaded is saved again.
    loaded.save(tmp_path / "task.keras")
    for again in (loaded, keras.saving.load_model(tmp_path / "task.keras")):
        np.testing.assert_array_equal(to_numpy(again(inputs)), expected)
        assert [layer.quantization_mode for layer in again._flatten_layers()] == modes
    body = type(task.backbone).from_preset(tmp_path / "preset")
    for new, old in zip(body.weights, task.backbone.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old))
    if kind == "PerformerTokenClassifier":
        task = PerformerSequenceClassifier.from_preset(tmp_path / "preset", num_classes=2)
        assert task.backbone.token_embedding.quantization_mode == "int8"
        assert task.output_dense.quantization_mode is None


READ_ELSEWHERE = """
import sys
import keras, numpy as np
from keras_performer import models
folder, names = sys.argv[1], sys.argv[2:]
outputs = {}
for name in names:
    if name == "performer_tiny":
        task = models.PerformerMaskedLM.from_preset(name)
    else:
        task = getattr(models, name).from_preset(f"{folder}/{name}")
    outputs[name] = keras.ops.convert_to_numpy(task(dict(np.load(f"{folder}/{name}.npz"))))
np.savez(f"{folder}/{keras.config.backend()}.npz", **outputs)
"""


def make_tasks():
    """A task of every kind, with features and options that have weights of their own."""
    sizes = (30, 2, 2, 12, 17)
    tokenizer, window = ProteinTokenizer(), {"exact_window": 3, "num_sink_tokens": 1}
    adaptive = FavorPlusPlus(13, balanced=True, projection="simplex")
    encoder = PerformerEncoderBackbone(*sizes, feature_map=adaptive, **window)
    decoder = PerformerDecoderBackbone(*sizes, num_features=13, reversible=True, **window)
    masked, causal = make_task(), PerformerCausalLMPreprocessor(tokenizer, 19)
    classifier = PerformerSequenceClassifierPreprocessor(tokenizer, 19)
    for layer in encoder.transformer_layers:
        x = np.random.default_rng(1).standard_normal((2, 7, 2, 6)).astype("float32")
        layer.self_attention.feature_map.update_statistics(x, 2 * x)
    return {
        "PerformerMaskedLM": (masked, masked_inputs()),
        "PerformerCausalLM": (PerformerCausalLM(decoder, causal), token_inputs()),
        "PerformerSequenceClassifier": (
            PerformerSequenceClassifier(encoder, 3, classifier),
            token_inputs(),
        ),
        "PerformerTokenClassifier": (PerformerTokenClassifier(encoder, 4), token_inputs()),
        # Of the zoo, which the other backends load by name.
        "performer_tiny": (PerformerMaskedLM.from_preset("performer_tiny"), masked_inputs()),
    }


def token_inputs():
    inputs = masked_inputs()
    del inputs["mask_positions"]
    return inputs


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_other_backends_read_presets_with_equal_outputs(tmp_path):
    others = [
        name
        for name in ("tensorflow", "jax", "torch")
        if name != BACKEND and importlib.util.find_spec(name) is not None
    ]
    if not others:
        pytest.skip("no other backend is installed")
    expected = {}
    for name, (task, inputs) in make_tasks().items():
        task.save_to_preset(str(tmp_path / name))
        np.savez(tmp_path / f"{name}.npz", **inputs)
        expected[name] = to_numpy(task(inputs))
        assert expected[name].std() > 1e-4
    started = {}
    for backend in others:
        started[backend] = subprocess.Popen(
            [sys.executable, "-c", READ_ELSEWHERE, str(tmp_path), *expected],
            env={**os.environ, "KERAS_BACKEND": backend},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
    for backend, process in started.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        outputs = np.load(tmp_path / f"{backend}.npz")
        for name, output in expected.items():
            np.testing.assert_allclose(
                outputs[name], output, rtol=1e-5, atol=1e-5, err_msg=f"{name} on {backend}"
            )


IMPORT_ORDERS = [
    ["keras_performer"],
    ["keras_performer", "keras_performer.export", "keras_performer.presets"],
    ["keras_performer.export"],
    ["keras_performer.presets", "keras_performer"],
]


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_public_names_are_functions_in_every_order_of_import(order, monkeypatch):
    for name in ("keras_performer", "keras_performer.export", "keras_performer.presets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in order:
        importlib.import_module(name)
    package = sys.modules["keras_performer"]
    assert package is not keras_performer
    for _ in range(2):
        for name in set(package.__all__) - {"__version__"}:
            function = getattr(package, name)
            assert isinstance(function, types.FunctionType), name
            assert function.__name__ == name
        for name in ("export", "presets"):
            module = importlib.import_module(f"keras_performer.{name}")
            assert getattr(module, name) is getattr(package, name)
    assert set(package.__all__) <= set(dir(package))


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, keras_performer\n"
        "keras_performer.presets()\n"
        "heavy = {'keras', 'keras_hub', 'tensorflow', 'jax', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run_code(code)


def test_unknown_names_of_the_package_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        _ = keras_performer.exprot


def test_version_is_that_of_the_project():
    project = tomllib.loads(
        (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    assert keras_performer.__version__ == project["version"]
