"""Converted models against the softmax models that they were made of."""

import importlib.util
import sys

import keras
import keras_hub
import numpy as np
import pytest
from marks import slow_on_jax
from processes import run_code
from tolerances import assert_close, assert_exact

from keras_performer.convert import (
    PerformerGPT2CausalLM,
    conversion_report,
    extend_positions,
    performerize,
)
from keras_performer.convert.hub_models import CLASSES
from keras_performer.feature_maps import FavorPlus
from keras_performer.layers import PerformerAttention

BACKEND = keras.config.backend()
HUB = keras_hub.models
# Longer than every input: attention is softmax attention then, if all else is right.
EXACT = {"exact_window": 16, "num_features": 8, "seed": 1}
SIZES = {
    "vocabulary_size": 31,
    "num_layers": 2,
    "num_heads": 3,
    "hidden_dim": 15,
    "intermediate_dim": 17,
    "max_sequence_length": 13,
}
WORDS = ["a", "quick", "fox", "dog", "sleeps", "runs"]


def to_numpy(x):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, x)


def slow_but_on_torch(*cases):
    """Further cases of what others test, where models take long to build and to compile."""
    marks = () if BACKEND == "torch" else pytest.mark.slow
    return [pytest.param(case, marks=marks) for case in cases]


@pytest.fixture
def eagerly():
    """Do not compile on TensorFlow, which takes longer than a few steps of small models."""
    if BACKEND != "tensorflow":
        yield
        return
    import tensorflow

    tensorflow.config.run_functions_eagerly(True)
    yield
    tensorflow.config.run_functions_eagerly(False)


def outputs_of(model, x):
    """What the model returns; under JAX compiled, since operations are compiled one by one else."""
    if BACKEND == "jax":
        return keras.Model.predict(model, x, verbose=0)
    return to_numpy(model(x))


def randomize(model):
    """Weights with which attention is far from uniform, and biases are not zero."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        scale = 0.7 if "/query/" in weight.path or "/q_dense" in weight.path else 0.4
        weight.assign(rng.normal(scale=scale, size=weight.shape).astype("float32"))
    return model


def prompts():
    rng = np.random.default_rng(1)
    mask = np.array([[1] * 11, [1] * 7 + [0] * 4], "int32")
    return rng.integers(2, 31, (2, 11)).astype("int32") * mask, mask


def inputs_of(model):
    ids, mask = prompts()
    if isinstance(getattr(model, "backbone", model), HUB.ESMBackbone) and BACKEND != "torch":
        # keras-hub 0.32 masks queries in place of keys here.
        ids, mask = ids[:1], mask[:1]
    data = {
        "token_ids": ids,
        "padding_mask": mask,
        "segment_ids": np.arange(11)[None, :] % 2 + 0 * ids,
        "mask_positions": np.array([[1, 4, 6]] * len(ids), "int32"),
    }
    return {name: data[name] for name in model.input}, mask > 0


def unmasked(output, mask):
    """What the output says of real tokens; pooled outputs as they are."""
    output = output["sequence_output"] if isinstance(output, dict) else output
    return output[mask] if output.shape[:2] == mask.shape else output


def assert_same_outputs(converted, original, x, mask):
    actual, expected = outputs_of(converted, x), outputs_of(original, x)
    assert_close(unmasked(actual, mask), unmasked(expected, mask), "layer")


def attention_model(layer, **call):
    x = keras.Input((None, 10), name="x")
    mask = keras.Input((None,), dtype="bool", name="mask")
    keys = keras.layers.Reshape((1, -1))(mask)
    hidden = layer(x, x, **(call or {"attention_mask": keys}))
    return randomize(keras.Model([x, mask], keras.layers.Dense(7)(hidden + x)))


def tokens(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 11, 10)).astype("float32"), prompts()[1] > 0


# Under JAX, Keras 3.15 fails where the two sizes differ.
VALUE_DIM = {} if BACKEND == "jax" else {"value_dim": 4}
LAYERS = {
    "key mask": (keras.layers.MultiHeadAttention(3, 5, **VALUE_DIM), {}),
    "causal": (keras.layers.MultiHeadAttention(3, 5, use_gate=True), {"use_causal_mask": True}),
    "grouped": (keras.layers.GroupQueryAttention(5, 6, 2, use_bias=False), {}),
    "band": (keras.layers.MultiHeadAttention(3, 5, sliding_window=3), {}),
}


@pytest.mark.parametrize("case", ["key mask", "causal", *slow_on_jax("grouped", "band")])
def test_attention_layers_of_a_functional_model(case):
    layer, call = LAYERS[case]
    model = attention_model(type(layer).from_config(layer.get_config()), **call)
    before = model.get_weights()
    converted = performerize(model, **EXACT)
    x, mask = tokens()
    keep = np.ones_like(mask) if call else mask
    assert type(converted) is type(model)
    assert_same_outputs(converted, model, [x, mask], keep)
    (row,) = conversion_report(converted)
    assert row.causal is bool(call)
    assert row.window == (3 if case == "band" else 16)
    # No weight is shared, and none of the original has changed.
    for weight in converted.trainable_variables:
        weight.assign(np.zeros(weight.shape))
    for now, then in zip(model.get_weights(), before, strict=True):
        assert_exact(now, then)


def test_features_are_used_beyond_the_window_and_a_band_is_exact():
    model = attention_model(keras.layers.MultiHeadAttention(3, 5))
    data = list(tokens())
    outputs = [
        outputs_of(performerize(model, **options), data)
        for options in ({"seed": 1}, {"seed": 2}, {"sliding_window": 2}, {"feature_map": None})
    ]
    expected = outputs_of(model, data)
    for output in outputs[:3]:
        assert np.abs(output - expected)[data[1]].max() > 1e-2
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    assert_close(outputs[3][data[1]], expected[data[1]], "layer")


@pytest.mark.slow_on_jax
def test_nested_models_shared_layers_and_frozen_ones():
    x = keras.Input((11, 10))
    shared = keras.layers.MultiHeadAttention(3, 5, name="shared")
    inner = keras.Model(x, shared(x, x) + shared(x, x, use_causal_mask=True), name="inner")
    stack = keras.Sequential(
        [keras.layers.Dense(10), keras_hub.layers.TransformerEncoder(17, 2, name="block")],
        name="stack",
    )
    frozen = keras.layers.Dense(10, trainable=False, name="frozen")
    model = randomize(keras.Model(x, frozen(stack(inner(inner(x))))))
    converted = performerize(model, **EXACT)
    assert_same_outputs(converted, model, tokens()[0], np.ones((2, 11), bool))
    names = [row.name for row in conversion_report(converted)]
    assert names == ["inner/shared", "stack/block/self_attention_layer"]
    assert isinstance(converted.get_layer("stack"), keras.Sequential)
    assert not converted.get_layer("frozen").trainable
    assert len(converted.trainable_variables) == len(model.trainable_variables)


@pytest.mark.slow_on_jax
def test_keras_masks_reach_the_converted_layers():
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(31, 10, mask_zero=True)(ids)
    x = keras.layers.MultiHeadAttention(3, 5)(x, x)
    x = keras_hub.layers.TransformerEncoder(17, 2, normalize_first=True)(x)
    model = randomize(keras.Model(ids, x))
    data, mask = prompts()
    assert_same_outputs(performerize(model, **EXACT), model, data, mask > 0)


def cross_model(**sizes):
    source, target = keras.Input((None, 10)), keras.Input((None, 10))
    masks = [keras.Input((None,), dtype="bool") for _ in range(2)]
    encoded = keras_hub.layers.TransformerEncoder(17, 2, activation="gelu")(
        source, padding_mask=masks[0]
    )
    decoded = keras_hub.layers.TransformerDecoder(17, 5, **sizes)(
        target, encoded, decoder_padding_mask=masks[1], encoder_padding_mask=masks[0]
    )
    return randomize(keras.Model([source, target, *masks], decoded))


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("normalize_first", [True, False])
def test_transformer_layers_with_cross_attention(normalize_first):
    model = cross_model(normalize_first=normalize_first)
    (source, mask), (target, _) = tokens(0), tokens(1)
    data = [source, target, mask, mask[::-1].copy()]
    exact = performerize(model, feature_map=None)
    assert_same_outputs(exact, model, data, data[3])
    converted = performerize(model, **EXACT)
    rows = conversion_report(converted)
    assert [(row.causal, row.window) for row in rows] == [(False, 16), (True, 16), (False, None)]
    assert np.abs(outputs_of(converted, data) - outputs_of(model, data))[data[3]].max() < 1


# JAX has a task of BERT's below.
BACKBONES = slow_on_jax(HUB.BertBackbone, HUB.ESMBackbone, HUB.GPT2Backbone)
BACKBONES += slow_but_on_torch(HUB.RobertaBackbone, HUB.DistilBertBackbone)


def backbone_of(cls, **sizes):
    more = {"use_pre_layer_norm": True} if cls is HUB.ESMBackbone else {}
    return randomize(cls(**{**SIZES, **({"hidden_dim": 18} if more else {}), **more, **sizes}))


@pytest.mark.parametrize("cls", BACKBONES)
def test_backbones_of_keras_hub(cls):
    model = backbone_of(cls)
    model.token_embedding.trainable = model.layers[-1].trainable = False
    before = model.get_weights()
    converted = performerize(model, **EXACT)
    assert isinstance(converted, cls)
    assert len(converted.trainable_variables) == len(model.trainable_variables)
    assert not converted.layers[-1].trainable
    x, mask = inputs_of(model)
    assert_same_outputs(converted, model, x, mask)
    report = conversion_report(converted)
    assert [row.causal for row in report] == [cls is HUB.GPT2Backbone] * 2
    assert {row.num_features for row in report} == {8}
    assert "transformer_layer_1/" in str(report)
    # All weights are there, bit for bit, and each layer has a projection of its own.
    ours = {w.path: to_numpy(w) for w in converted.weights}
    projections = [ours.pop(path) for path in list(ours) if "feature_map" in path]
    assert len(projections) == 2
    assert np.abs(projections[0] - projections[1]).max() > 0.1
    values = sorted(w.ravel().tolist() for w in ours.values())
    assert values == sorted(w.ravel().tolist() for w in before)
    # A window that does not reach gives something else.
    far = performerize(model, exact_window=2, num_features=8)
    difference = unmasked(outputs_of(far, x), mask) - unmasked(outputs_of(model, x), mask)
    assert np.abs(difference).max() > 1e-3


def word_pieces(cls, preprocessor_cls):
    tokenizer = cls(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    return preprocessor_cls(tokenizer, sequence_length=11)


def byte_pairs(cls, preprocessor_cls, special):
    vocabulary = [
        *special,
        *(f"Ġ{w}" for w in WORDS),
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz",
        "Ġ",
        "fo",
    ]
    vocabulary = list(dict.fromkeys(vocabulary))
    tokenizer = cls({token: i for i, token in enumerate(vocabulary)}, merges=["f o", "fo x"])
    return preprocessor_cls(tokenizer, sequence_length=11)


def tasks():
    bert = word_pieces(HUB.BertTokenizer, HUB.BertMaskedLMPreprocessor)
    classes = word_pieces(HUB.BertTokenizer, HUB.BertTextClassifierPreprocessor)
    distil = word_pieces(HUB.DistilBertTokenizer, HUB.DistilBertMaskedLMPreprocessor)
    gpt2 = byte_pairs(HUB.GPT2Tokenizer, HUB.GPT2CausalLMPreprocessor, ["<|endoftext|>"])
    roberta = byte_pairs(
        HUB.RobertaTokenizer,
        HUB.RobertaTextClassifierPreprocessor,
        ["<s>", "<pad>", "</s>", "<mask>"],
    )
    residues = ["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *"LAGVSERTIDPKQNFYMHWC"]
    esm = HUB.ESMMaskedPLMPreprocessor(HUB.ESMTokenizer(residues), sequence_length=11)
    return {
        "BertMaskedLM": (HUB.BertMaskedLM, HUB.BertBackbone, bert, {}),
        "BertTextClassifier": (
            HUB.BertTextClassifier,
            HUB.BertBackbone,
            classes,
            {"num_classes": 3},
        ),
        "DistilBertMaskedLM": (HUB.DistilBertMaskedLM, HUB.DistilBertBackbone, distil, {}),
        "RobertaTextClassifier": (
            HUB.RobertaTextClassifier,
            HUB.RobertaBackbone,
            roberta,
            {"num_classes": 3},
        ),
        "GPT2CausalLM": (HUB.GPT2CausalLM, HUB.GPT2Backbone, gpt2, {}),
        "ESMMaskedPLM": (HUB.ESMMaskedPLM, HUB.ESMBackbone, esm, {}),
    }


TASKS = [
    "BertTextClassifier",
    "GPT2CausalLM",
    "ESMMaskedPLM",
    "BertMaskedLM",
    "DistilBertMaskedLM",
    "RobertaTextClassifier",
]


def task_of(name):
    cls, backbone_cls, preprocessor, options = tasks()[name]
    vocabulary_size = max(31, preprocessor.tokenizer.vocabulary_size())
    backbone = backbone_of(backbone_cls, vocabulary_size=vocabulary_size, num_layers=1)
    return randomize(cls(backbone, preprocessor=preprocessor, **options))


@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("name", [*slow_on_jax(*TASKS[:3]), *slow_but_on_torch(*TASKS[3:])])
def test_tasks_stay_tasks_and_survive_their_files(name, tmp_path):
    task = task_of(name)
    converted = performerize(task, **EXACT)
    x, mask = inputs_of(task)
    assert isinstance(converted, type(task))
    assert converted.preprocessor is task.preprocessor
    assert_same_outputs(converted, task, x, mask)

    # Strings go in as before.
    text = ["MLAG", "SER"] if "ESM" in name else ["a quick fox", "dog sleeps"]
    if "Classifier" in name:
        assert converted.predict(text, verbose=0).shape == (2, 3)
    else:
        assert np.isfinite(converted.evaluate(text, verbose=0)[0])

    converted.save(tmp_path / "model.keras")
    preset = str(tmp_path / "preset")
    converted.save_to_preset(preset)
    loaded = [
        keras.saving.load_model(tmp_path / "model.keras"),
        type(task).__mro__[1].from_preset(preset),  # the class of all such tasks
        type(task).from_preset(preset),
    ]
    for model in loaded:
        assert type(model) is type(converted)
        assert conversion_report(model) == conversion_report(converted)
        assert model.preprocessor.sequence_length == 11
        for new, old in zip(model.weights, converted.weights, strict=True):
            assert_exact(new, old)
    assert_exact(outputs_of(loaded[-1], x), outputs_of(converted, x))
    tokenizer = type(task.preprocessor.tokenizer).from_preset(preset)
    assert tokenizer.vocabulary_size() == task.preprocessor.tokenizer.vocabulary_size()
    backbone = task.backbone_cls.from_preset(preset)
    assert conversion_report(backbone) == conversion_report(converted.backbone)


def registered_backbones():
    registered = set(keras.saving.get_custom_objects().values())
    backbones = {x for x in registered if isinstance(x, type) and issubclass(x, HUB.Backbone)}
    ours = {x for x in backbones if x.__module__.startswith("keras_performer")}
    theirs = {base for x in ours for base in x.__mro__ if base in vars(HUB).values()}
    return sorted((ours | theirs) - {HUB.Backbone}, key=lambda x: x.__name__)


def classes_found(backbone):
    """What keras-hub may take for a preset of a backbone, by the class that is asked for one."""
    registered = set(keras.saving.get_custom_objects().values())
    kinds = {x for x in vars(HUB).values() if hasattr(x, "backbone_cls")}
    fitting = [x for x in registered if getattr(x, "backbone_cls", None) is backbone]
    found = {kind: [x for x in fitting if issubclass(x, kind) and x is not kind] for kind in kinds}
    return {kind: classes for kind, classes in found.items() if classes}


@pytest.mark.parametrize("backbone", registered_backbones())
def test_a_preset_of_a_backbone_finds_one_class_of_each_kind(backbone):
    """Of several that fit keras-hub takes the first of a set, whose order is random."""
    found = classes_found(backbone)
    assert found
    for kind, classes in found.items():
        # Those two refuse to look, and a tokenizer's class is read from its own file.
        if kind not in (HUB.Task, HUB.Preprocessor) and not issubclass(kind, HUB.Tokenizer):
            assert len(classes) == 1, (kind, classes)
    for theirs in set(backbone.__mro__[1:]) & set(registered_backbones()):
        assert classes_found(theirs).keys() <= found.keys()


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eagerly")
def test_another_task_starts_from_the_preset_of_a_converted_one(tmp_path):
    converted = performerize(task_of("BertMaskedLM"), **EXACT)
    converted.save_to_preset(str(tmp_path))
    classifier = HUB.TextClassifier.from_preset(str(tmp_path), num_classes=5)
    assert isinstance(classifier, HUB.BertTextClassifier)
    classifier.preprocessor.sequence_length = 11
    assert classifier.predict(["a quick fox"], verbose=0).shape == (1, 5)
    for new, old in zip(classifier.backbone.weights, converted.backbone.weights, strict=True):
        assert_exact(new, old)


LOAD = """
import sys
import keras
import numpy as np
import keras_hub
import keras_performer.convert

folder = sys.argv[1]
inputs = dict(np.load(f"{folder}/inputs.npz"))
causal = keras_hub.models.GPT2CausalLM.from_preset(f"{folder}/preset", preprocessor=None)
functional = keras.saving.load_model(f"{folder}/functional.keras")
# JAX compiles a model faster than one operation after the other.
eagerly = keras.config.backend() != "jax"
causal.run_eagerly = functional.run_eagerly = eagerly
outputs = {
    "preset": causal.predict(
        {name: inputs[name] for name in ("token_ids", "padding_mask")}, verbose=0
    ),
    "functional": functional.predict(inputs["x"], verbose=0),
}
np.savez(f"{folder}/outputs.npz", **outputs)
"""


# Each run of the tests hands its files to one other backend, so that all three get some.
NEXT = {"tensorflow": "jax", "jax": "torch", "torch": "tensorflow"}


# The other process imports and compiles for as long as ten tests here.
@pytest.mark.parametrize("folder", slow_but_on_torch("files"))
def test_files_load_in_a_new_process_of_another_backend(folder, tmp_path):
    tmp_path = tmp_path / folder
    tmp_path.mkdir()
    backend = NEXT[BACKEND] if importlib.util.find_spec(NEXT[BACKEND]) else BACKEND
    feature_map = FavorPlus(8, seed=1)
    converted = performerize(
        task_of("GPT2CausalLM"), feature_map=feature_map, exact_window=3, num_sink_tokens=1
    )
    x = keras.Input((None, 10))
    hidden = keras.layers.MultiHeadAttention(3, 5)(x, x)
    hidden = keras_hub.layers.TransformerDecoder(17, 2)(hidden)
    model = randomize(keras.Model(x, keras_hub.layers.TransformerEncoder(17, 2)(hidden)))
    functional = performerize(model, num_features=8, exact_window=3, seed=1)
    inputs = {**inputs_of(converted)[0], "x": tokens()[0]}
    np.savez(tmp_path / "inputs.npz", **inputs)
    converted.save_to_preset(str(tmp_path / "preset"))
    functional.save(tmp_path / "functional.keras")
    run_code(LOAD, str(tmp_path), backend=backend)
    outputs = np.load(tmp_path / "outputs.npz")
    assert_close(outputs["preset"], outputs_of(converted, inputs_of(converted)[0]), "layer")
    assert_close(outputs["functional"], outputs_of(functional, inputs["x"]), "layer")


def greedy(model, ids, mask, length):
    """Tokens by whole passes, without a state."""
    ids, lengths = ids.copy(), mask.sum(axis=1)
    for row in range(len(ids)):
        for place in range(lengths[row], length):
            seen = ids[row : row + 1].copy()
            padding = (np.arange(ids.shape[1])[None] < place).astype("int32")
            logits = outputs_of(model, {"token_ids": seen, "padding_mask": padding})
            ids[row, place] = logits[0, place - 1].argmax()
    return ids


FAR = {"exact_window": 2, "num_features": 8, "seed": 1}


@pytest.mark.parametrize("options", [FAR, *slow_but_on_torch(EXACT)])
def test_generation_carries_a_state_and_equals_whole_passes(options):
    model = HUB.GPT2CausalLM(backbone_of(HUB.GPT2Backbone))
    converted = performerize(model, **options)
    assert type(converted) is PerformerGPT2CausalLM
    ids = np.zeros((2, 12), "int32")
    mask = np.array([[1] * 5 + [0] * 7, [1] * 3 + [0] * 9], "int32")
    ids[mask > 0] = [3, 9, 4, 22, 17, 8, 2, 30]
    converted.compile(sampler="greedy")
    prompts = {"token_ids": ids, "padding_mask": mask}
    output = converted.generate(prompts, stop_token_ids=None)["token_ids"]
    if options is EXACT:
        # What the original would have written.
        np.testing.assert_array_equal(output, greedy(model, ids, mask, 12))
    np.testing.assert_array_equal(output, greedy(converted, ids, mask, 12))
    state = converted.backbone.initial_state(1)
    limit = converted.backbone.max_sequence_length
    with pytest.raises(ValueError, match=f"at most {limit} tokens"):
        converted.backbone.call_with_state(
            {"token_ids": np.zeros((1, limit + 1), "int32"), "padding_mask": None}, state
        )
    sizes = {x.size for part in state for x in to_numpy(part).values()}
    assert max(sizes) <= 3 * 8 * 5 if options is not EXACT else True


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eagerly")
def test_strings_are_generated_and_a_sampler_is_kept(tmp_path):
    converted = performerize(task_of("GPT2CausalLM"), exact_window=4, num_features=8, seed=1)
    converted.compile(sampler="greedy", optimizer="sgd", loss="mse")
    text = converted.generate(["a quick fox", "dog"], max_length=10)
    assert text[0].startswith("a quick fox")
    converted.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.generate(["a quick fox", "dog"], max_length=10) == text
    with pytest.raises(ValueError, match="positions for 13 tokens"):
        converted.generate(["a"], max_length=14)
    longer = extend_positions(converted, 20)
    assert isinstance(longer.generate("a", max_length=14), str)


class HomeMade(keras.layers.Layer):
    """A layer whose attention no one can see from outside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = keras.layers.MultiHeadAttention(2, 5, name="inside")

    def build(self, shape):
        self.inside.build(shape, shape)

    def call(self, x):
        return self.inside(x, x)


def refused(build):
    x = keras.Input((11, 10))
    return keras.Model(x, build(x))


def full_mask(x):
    mask = keras.ops.ones_like(keras.ops.matmul(x, keras.ops.transpose(x, (0, 2, 1))))
    return keras.layers.MultiHeadAttention(2, 5, name="first")(
        x, x, attention_mask=mask
    ) + keras.layers.MultiHeadAttention(2, 5, name="second")(
        x, x, attention_mask=np.ones((11, 11), "bool")
    )


REFUSED = {
    "masks of queries, in two layers": (full_mask, {}, r"(?s)first.*\(None, 11, 11\).*second"),
    "a mask of queries in keras-hub's layer": (
        lambda x: keras_hub.layers.TransformerDecoder(17, 2, name="block")(
            x, decoder_attention_mask=np.ones((1, 11, 11), "bool")
        ),
        {},
        r"block: its attention_mask",
    ),
    "cross-attention with a window": (
        lambda x: keras.layers.MultiHeadAttention(2, 5, name="cross")(x, x * 2),
        {"exact_window": 4},
        "cross: exact_window needs",
    ),
    "a layer of one's own": (
        lambda x: HomeMade(name="mine")(x),
        {},
        r"mine: class .*HomeMade.*'inside' \(MultiHeadAttention\)",
    ),
    "attention without heads": (
        lambda x: keras.layers.Attention(name="plain")([x, x]),
        {},
        r"plain: class .*Attention",
    ),
    "attention as an operation": (
        lambda x: keras.ops.dot_product_attention(*[keras.ops.expand_dims(x, 2)] * 3),
        {},
        "DotProductAttention",
    ),
    "several axes": (
        lambda x: keras.ops.squeeze(
            keras.layers.MultiHeadAttention(2, 5, name="image")(*[keras.ops.expand_dims(x, 1)] * 2),
            1,
        ),
        {},
        r"image: .*attention_axes=\(1, 2\)",
    ),
    "no attention": (lambda x: keras.layers.Dense(3)(x), {}, "no attention"),
    "a map without softmax": (lambda x: x, {"feature_map": "relu", "exact_window": 4}, "relu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replaced_is_named(case):
    build, options, message = REFUSED[case]
    model = refused(build)
    before = len(model.layers)
    with pytest.raises(ValueError, match=message):
        performerize(model, **options)
    assert len(model.layers) == before
    assert not any(isinstance(x, PerformerAttention) for x in model._flatten_layers())


def test_other_models_of_keras_hub_and_other_objects_are_refused():
    backbone = HUB.XLMRobertaBackbone(**SIZES)
    with pytest.raises(ValueError, match="XLMRobertaBackbone"):
        performerize(backbone)
    with pytest.raises(TypeError, match="Keras model"):
        performerize(keras.layers.MultiHeadAttention(2, 5))
    with pytest.raises(ValueError, match="in place of a cache"):
        performerize(HUB.GPT2CausalLM(backbone_of(HUB.GPT2Backbone))).call_with_cache(0, 0, 0)


@pytest.mark.parametrize(
    "cls",
    [*slow_on_jax(HUB.BertBackbone), *slow_but_on_torch(HUB.RobertaBackbone, HUB.GPT2Backbone)],
)
def test_tiled_positions_leave_short_inputs_alone_and_read_long_ones(cls):
    model = backbone_of(cls)
    for original in (model, performerize(model, **EXACT)):
        longer = extend_positions(original, 29)
        assert type(longer) is type(original)
        assert longer.max_sequence_length == 29
        x, _ = inputs_of(model)
        assert_exact(
            unmasked(outputs_of(longer, x), np.ones((2, 11), bool)),
            unmasked(outputs_of(original, x), np.ones((2, 11), bool)),
        )
        long = {name: np.ones((1, 29), "int32") for name in model.input}
        assert unmasked(outputs_of(longer, long), np.ones((1, 29), bool)).shape[-2:] == (29, 15)


def test_positions_of_tasks_and_graphs_are_tiled_or_interpolated():
    x = keras.Input((None,), dtype="int32")
    layer = keras_hub.layers.TokenAndPositionEmbedding(31, 4, 3)
    model = randomize(keras.Model(x, layer(x)))
    table = to_numpy(layer.position_embedding.position_embeddings)
    for method in ("tile", "interpolate"):
        longer = extend_positions(model, 7, method)
        new = to_numpy(longer.layers[1].position_embedding.position_embeddings)
        if method == "tile":
            assert_exact(new, np.concatenate([table, table[:3]]))
        else:
            assert_close(new[::2], table)
            assert_close(new[1::2], (table[1:] + table[:-1]) / 2)
        assert_exact(longer.layers[1].token_embedding.embeddings, layer.token_embedding.embeddings)
    task = extend_positions(task_of("BertMaskedLM"), 29)
    assert isinstance(task, HUB.BertMaskedLM)
    assert task.backbone.max_sequence_length == 29
    for source, length, method, message in (
        (model, 4, "tile", "length=4"),
        (model, 8, "stretch", "stretch"),
        (backbone_of(HUB.ESMBackbone), 29, "tile", "no learned positions"),
    ):
        with pytest.raises(ValueError, match=message):
            extend_positions(source, length, method)


def test_quantized_heads_are_refused():
    task = HUB.BertTextClassifier(backbone_of(HUB.BertBackbone, num_layers=1), num_classes=2)
    task.get_layer("logits").quantize("int8")
    with pytest.raises(ValueError, match=r"'logits' do not fit .*before LoRA or quantization"):
        performerize(task, num_features=8)


def test_offset_positions_keep_their_offset():
    model = backbone_of(HUB.ESMBackbone, position_embedding_type="absolute", pad_token_id=1)
    table = to_numpy(model.position_embedding.position_embeddings)
    longer = extend_positions(model, 25)
    new = to_numpy(longer.position_embedding.position_embeddings)
    assert_exact(new, np.concatenate([table, table[1:]]))


def test_what_is_shared_within_and_around_a_backbone_stays_shared():
    backbone = backbone_of(HUB.GPT2Backbone)
    logits = backbone.token_embedding(backbone(backbone.input), reverse=True)
    model = keras.Model(backbone.input, logits)
    for made in (
        performerize(model, num_features=8),
        extend_positions(model, backbone.max_sequence_length + 3),
    ):
        inner = next(layer for layer in made.layers if isinstance(layer, keras.Model))
        assert inner.token_embedding in made.layers


def test_ties_that_would_be_lost_are_refused():
    ids = keras.Input((None,), dtype="int32")
    places = keras.Input((None,), dtype="int32")
    embedding = keras_hub.layers.TokenAndPositionEmbedding(31, 8, 8)
    x = embedding(ids)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    head = keras_hub.layers.MaskedLMHead(token_embedding=embedding.token_embedding)
    model = keras.Model([ids, places], head(x, places))
    for convert in (performerize, lambda model: extend_positions(model, 9)):
        with pytest.raises(ValueError, match="share weights in a way"):
            convert(model)


def test_a_model_compiled_with_functions_of_ones_own_is_converted():
    x = keras.Input((None, 8))
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 4)(x, x))
    model.compile("sgd", lambda y, p: keras.ops.mean((y - p) ** 2), jit_compile=False)
    with pytest.warns(UserWarning, match="is not compiled"):
        made = performerize(model, num_features=8)
    assert model.compiled
    assert not made.compiled
    model.compile("sgd", "mse", jit_compile=False)
    assert performerize(model, num_features=8).loss == "mse"


def test_a_subclass_of_attention_is_not_left_quadratic():
    class Mixer(keras.layers.MultiHeadAttention):
        pass

    x = keras.Input((None, 8))
    h = Mixer(2, 4)(x, x)
    model = keras.Model(x, keras.layers.MultiHeadAttention(2, 4)(h, h))
    with pytest.raises(ValueError, match="Mixer"):
        performerize(model)


def test_converted_tasks_are_found_where_they_say_they_are():
    for cls in CLASSES.values():
        assert getattr(sys.modules[cls.__module__], cls.__name__) is cls


def test_inputs_of_a_fixed_length_cannot_become_longer():
    ids = keras.Input((8,), dtype="int32")
    model = keras.Model(ids, keras_hub.layers.TokenAndPositionEmbedding(31, 8, 8)(ids))
    with pytest.raises(ValueError, match=r"fixed to the old length.*\(None, 8\)"):
        extend_positions(model, 12)
