import inspect
import json

import keras
import keras_hub
import numpy as np
import pytest
from tolerances import to_numpy

from keras_performer.feature_maps import FavorPlus
from keras_performer.models import (
    PerformerCausalLM,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSeq2SeqBackbone,
    PerformerSeq2SeqLM,
    ProteinTokenizer,
)

BACKEND = keras.config.backend()
TEXTS = ["MKTAYIAKQRQISFVK", "ACDEFGH", "WYV", "GGGGGSSSSS"]
SIZES = {
    "vocabulary_size": 30,
    "num_layers": 1,
    "num_heads": 3,
    "hidden_dim": 12,
    "intermediate_dim": 17,
    "num_features": 13,
}
NON_DEFAULT = {
    **SIZES,
    "num_heads": 4,
    "key_dim": 6,
    "num_key_value_heads": 2,
    "feature_map": "relu",
    "qk_norm": False,
    "position_embedding": "learned",
    "max_sequence_length": 23,
    "rotary_max_wavelength": 700,
    "gated": True,
    "activation": "silu",
    "dropout": 0.25,
    "attention_dropout": 0.125,
    "layer_norm_epsilon": 1e-4,
    "use_bias": False,
    "kernel_initializer": "zeros",
    "attention": "sliding_window",
    "sliding_window": 9,
    "exact_window": 6,
    "num_sink_tokens": 2,
    "far_bias": -1.5,
    "tie_weights": False,
    "remat": False,
    "reversible": True,
    "seed": 3,
}


def make_backbone(**options):
    return PerformerEncoderBackbone(**{**SIZES, **options})


def make_task(**options):
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=19)
    return PerformerMaskedLM(make_backbone(**options), preprocessor)


def token_inputs(lengths=(5, 11), total=11):
    rng = np.random.default_rng(0)
    padding_mask = (np.arange(total) < np.array(lengths)[:, None]).astype("int32")
    token_ids = rng.integers(5, 30, size=padding_mask.shape).astype("int32")
    return {"token_ids": token_ids * padding_mask, "padding_mask": padding_mask}


def masked_inputs():
    return {**token_inputs(), "mask_positions": np.array([[1, 4, 0], [2, 10, 7]], "int32")}


def test_backbone_shapes_and_parts():
    backbone = make_backbone(num_layers=2)
    assert backbone.output_shape == (None, None, 12)
    assert tuple(backbone(token_inputs()).shape) == (2, 11, 12)
    assert len(backbone.transformer_layers) == 2
    assert isinstance(backbone, keras_hub.models.Backbone)
    projections = [w for w in backbone.weights if w.path.endswith("projection")]
    assert len(projections) == 2
    assert np.abs(to_numpy(projections[0]) - to_numpy(projections[1])).max() > 0.1


@pytest.mark.parametrize("position_embedding", ["rotary", "learned"])
def test_padding_changes_no_other_token(position_embedding):
    longest = None if position_embedding == "rotary" else 23
    backbone = make_backbone(position_embedding=position_embedding, max_sequence_length=longest)
    x = token_inputs()
    x["token_ids"][0, 5:] = 7
    padded = to_numpy(backbone(x))
    for row, length in ((0, 5), (1, 11)):
        alone = backbone({name: value[row : row + 1, :length] for name, value in x.items()})
        np.testing.assert_allclose(padded[row, :length], to_numpy(alone)[0], rtol=1e-5, atol=1e-5)


def test_order_matters():
    for options in ({}, {"position_embedding": "learned", "max_sequence_length": 11}):
        backbone = make_backbone(**options)
        # Learned positions start small beside the layer norms' epsilon, yet they are there.
        x = token_inputs(lengths=(11, 11))
        turned = {name: value[:, ::-1].copy() for name, value in x.items()}
        assert np.abs(to_numpy(backbone(turned))[:, ::-1] - to_numpy(backbone(x))).max() > 1e-4


def test_config_round_trip_keeps_every_argument():
    arguments = set(inspect.signature(PerformerEncoderBackbone).parameters) - {"kwargs", "dtype"}
    assert arguments == set(NON_DEFAULT)
    backbone = PerformerEncoderBackbone(**NON_DEFAULT, name="body")
    config = json.loads(json.dumps(backbone.get_config()))
    assert config["kernel_initializer"]["class_name"] == "Zeros"
    for name in arguments - {"kernel_initializer"}:
        assert config[name] == NON_DEFAULT[name], name
    twin = PerformerEncoderBackbone.from_config(config)
    assert json.loads(json.dumps(twin.get_config())) == config
    assert [w.shape for w in twin.weights] == [w.shape for w in backbone.weights]
    rng = np.random.default_rng(0)
    backbone.set_weights([rng.normal(size=w.shape) for w in backbone.weights])
    twin.set_weights(backbone.get_weights())
    x = token_inputs()
    np.testing.assert_array_equal(to_numpy(twin(x)), to_numpy(backbone(x)))


def test_feature_map_instance_is_copied_into_each_block(tmp_path):
    feature_map = FavorPlus(num_features=13, seed=5)
    backbone = make_backbone(feature_map=feature_map, num_features=None, num_layers=2)
    assert sum(w.path.endswith("projection") for w in backbone.weights) == 2
    backbone.save(tmp_path / "body.keras")
    loaded = keras.saving.load_model(tmp_path / "body.keras")
    x = token_inputs()
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(backbone(x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary_size": 0}, "vocabulary_size=0"),
        ({"num_layers": -1}, "num_layers=-1"),
        ({"num_layers": True}, "num_layers=True"),
        ({"num_heads": 2.0}, "num_heads=2.0"),
        ({"hidden_dim": "12"}, "hidden_dim='12'"),
        ({"intermediate_dim": 0}, "intermediate_dim=0"),
        ({"key_dim": 0}, "key_dim=0"),
        ({"num_heads": 5}, "hidden_dim=12, num_heads=5"),
        ({"num_heads": 4}, "even head size.*head size 3"),
        ({"position_embedding": "absolute"}, "position_embedding='absolute'"),
        ({"position_embedding": "learned"}, "max_sequence_length=None"),
        ({"max_sequence_length": 9}, "max_sequence_length=9"),
        ({"rotary_max_wavelength": None}, "rotary_max_wavelength=None"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"feature_map": "favour"}, "favour"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_backbone(**options)


def test_learned_positions_refuse_longer_inputs():
    backbone = make_backbone(position_embedding="learned", max_sequence_length=10)
    with pytest.raises(ValueError, match=r"at most 10 tokens\. Received: inputs of length 11"):
        backbone(token_inputs())


def test_preprocessor_packs_and_masks():
    preprocessor = PerformerMaskedLMPreprocessor(
        ProteinTokenizer(), sequence_length=9, mask_selection_rate=1.0, mask_token_rate=1.0,
        random_token_rate=0.0,
    )  # fmt: skip
    x, y, sample_weight = preprocessor(["ACD", "ACDEFGHIKL"])
    assert to_numpy(x["token_ids"]).tolist() == [
        [1, 3, 3, 3, 2, 0, 0, 0, 0],
        [1, 3, 3, 3, 3, 3, 3, 3, 2],
    ]
    assert to_numpy(x["padding_mask"]).tolist() == [[1] * 5 + [0] * 4, [1] * 9]
    assert to_numpy(x["mask_positions"]).tolist() == [
        [1, 2, 3, 0, 0, 0, 0],
        [1, 2, 3, 4, 5, 6, 7],
    ]
    assert to_numpy(y).tolist() == [[5, 6, 7, 0, 0, 0, 0], list(range(5, 12))]
    assert to_numpy(sample_weight).tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]


def test_preprocessor_never_selects_special_tokens_and_has_room():
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=402)
    x, y, sample_weight = preprocessor(["A" * 400, "J" * 400] * 20)
    weight = to_numpy(sample_weight)
    # Mean 60, standard deviation 7.1: room for five of them.
    assert weight.shape == (40, 96)
    assert np.abs(weight[::2].sum(axis=1).mean() - 60) < 5 * 7.2 / np.sqrt(20)
    assert weight[1::2].sum() == 0
    assert set(to_numpy(y)[weight == 1]) == {5.0}
    assert to_numpy(x["padding_mask"]).all()


def test_preprocessor_length_can_be_set_before_and_after_use():
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=9)
    for length, places in ((402, 96), (5, 3)):
        preprocessor.sequence_length = length
        x, y, _ = preprocessor("A" * 400)
        assert tuple(x["token_ids"].shape) == (length,)
        assert tuple(y.shape) == tuple(x["mask_positions"].shape) == (places,)
    with pytest.raises(ValueError, match="sequence_length=2"):
        preprocessor.sequence_length = 2


def test_preprocessor_config_round_trip():
    preprocessor = PerformerMaskedLMPreprocessor(
        ProteinTokenizer(), sequence_length=31, mask_selection_rate=0.3, mask_selection_length=7,
        mask_token_rate=0.6, random_token_rate=0.2,
    )  # fmt: skip
    config = json.loads(json.dumps(preprocessor.get_config()))
    twin = PerformerMaskedLMPreprocessor.from_config(json.loads(json.dumps(config)))
    assert json.loads(json.dumps(twin.get_config())) == config
    assert (config["sequence_length"], config["mask_selection_length"]) == (31, 7)
    assert PerformerMaskedLMPreprocessor(ProteinTokenizer()).mask_selection_length is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"mask_selection_rate": 0}, "mask_selection_rate=0"),
        ({"mask_selection_length": 0}, "mask_selection_length=0"),
        ({"mask_token_rate": 0.95}, "mask_token_rate=0.95"),
    ],
)
def test_preprocessor_names_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PerformerMaskedLMPreprocessor(ProteinTokenizer(), **options)


def test_preprocessor_refuses_labels_and_segments():
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=9)
    with pytest.raises(ValueError, match="makes the labels"):
        preprocessor(["A"], y=[1])
    with pytest.raises(ValueError, match="a tuple of 2 segments"):
        preprocessor(x=(["A"], ["C"]))


def test_masked_lm_predicts_at_the_masked_positions_with_tied_weights():
    task = make_task()
    x = masked_inputs()
    logits = to_numpy(task(x))
    assert logits.shape == (2, 3, 30)
    shifted = {**x, "mask_positions": x["mask_positions"][:, ::-1].copy()}
    np.testing.assert_allclose(to_numpy(task(shifted)), logits[:, ::-1], rtol=1e-5, atol=1e-5)
    tables = [w for w in task.weights if tuple(w.shape) in ((30, 12), (12, 30))]
    assert [w.path for w in tables] == [task.backbone.token_embedding.embeddings.path]


@pytest.mark.slow_on_tensorflow
def test_masked_lm_learns_from_strings_and_every_weight_moves():
    # Every sequence repeats one letter: a masked one can be told from the others only.
    keras.utils.set_random_seed(0)
    texts = [letter * 17 for letter in np.random.default_rng(0).choice(list("ACDEF"), size=64)]
    task = make_task(gated=True)
    # XLA where the backend has it; PyTorch's compiler takes a minute.
    task.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        weighted_metrics=["accuracy"],
        jit_compile=BACKEND != "torch",
    )
    before = [to_numpy(w) for w in task.trainable_weights]
    history = task.fit(texts, batch_size=32, epochs=8, verbose=0).history
    # The most frequent letter is 28 % of them.
    assert max(history["accuracy"]) > 0.5
    assert np.isfinite(history["loss"]).all()
    for weight, old in zip(task.trainable_weights, before, strict=True):
        assert np.abs(to_numpy(weight) - old).max() > 0, weight.path


def test_masked_lm_evaluates_and_predicts_strings():
    task = make_task()
    task.compile(jit_compile=False)
    evaluated = task.evaluate(TEXTS, batch_size=2, verbose=0, return_dict=True)
    assert set(evaluated) == {"loss", "sparse_categorical_accuracy"}
    assert np.isfinite(evaluated["loss"])
    predicted = task.predict(TEXTS, batch_size=2, verbose=0)
    assert predicted.shape == (4, 10, 30)
    assert np.isfinite(predicted).all()


@pytest.mark.slow_on_jax
def test_masked_lm_takes_datasets_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    task = make_task()
    task.compile(jit_compile=False)
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2)
    assert np.isfinite(task.evaluate(dataset, verbose=0)[0])
    x, y, sample_weight = next(iter(dataset.map(task.preprocessor)))
    assert x["token_ids"].shape == x["padding_mask"].shape == (2, 19)
    assert x["mask_positions"].shape == y.shape == sample_weight.shape == (2, 10)
    assert (x["padding_mask"].numpy() == (x["token_ids"].numpy() != 0)).all() or (
        # A random replacement may be the padding token.
        x["padding_mask"].numpy().sum() == 2 * 2 + 16 + 7
    )


@pytest.mark.slow_on_jax
def test_saved_task_loads_bit_equal_with_its_optimizer(tmp_path):
    task = make_task()
    x = masked_inputs()
    y = np.array([[5, 6, 7], [8, 9, 10]], "int32")
    task.preprocessor = None
    task.compile(optimizer=keras.optimizers.Adam(1e-2), jit_compile=False)
    task.fit(x, y, batch_size=2, verbose=0)
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert isinstance(loaded, PerformerMaskedLM)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(task(x)))
    assert int(to_numpy(loaded.optimizer.iterations)) == 1
    assert float(to_numpy(loaded.optimizer.learning_rate)) == pytest.approx(1e-2)
    for new, old in zip(loaded.optimizer.variables, task.optimizer.variables, strict=True):
        np.testing.assert_array_equal(to_numpy(new), to_numpy(old), err_msg=old.path)


def test_saved_task_keeps_its_preprocessor(tmp_path):
    task = make_task()
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert loaded.preprocessor.sequence_length == 19
    assert loaded.preprocessor.tokenizer("MK").tolist() == [15, 13]


def test_mixed_precision():
    task = make_task(dtype="mixed_bfloat16")
    assert {w.dtype for w in task.trainable_weights} == {"float32"}
    assert task.backbone.get_config()["dtype"]["config"]["name"] == "mixed_bfloat16"
    x = masked_inputs()
    hidden = task.backbone({name: x[name] for name in ("token_ids", "padding_mask")})
    assert keras.backend.standardize_dtype(hidden.dtype) == "bfloat16"
    plain = make_task()
    plain.set_weights(task.get_weights())
    expected, got = to_numpy(plain(x)), to_numpy(task(x))
    error = np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 2e-2


def test_lora_finds_the_attention_layers():
    backbone = make_backbone()
    backbone.enable_lora(rank=2)
    paths = [w.path for w in backbone.trainable_weights]
    assert sum("lora_kernel" in path for path in paths) == 4
    assert {path.split("/")[-2] for path in paths} == {"query", "value"}


def test_tasks_refuse_backbones_of_another_kind():
    encoder = make_backbone()
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 9}
    decoder, both = (
        cls(vocabulary_size=30, **sizes)
        for cls in (PerformerDecoderBackbone, PerformerSeq2SeqBackbone)
    )
    for task, wrong in (
        (PerformerMaskedLM, decoder),
        # Its tokens would see those that it is to predict.
        (PerformerCausalLM, encoder),
        (PerformerCausalLM, both),
        (PerformerSeq2SeqLM, decoder),
    ):
        name = type(wrong).__name__
        with pytest.raises(TypeError, match=f"{task.__name__} needs a Perf.*of type {name}"):
            task(wrong)


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_int8_reaches_the_token_embedding():
    task = make_task(tie_weights=False)
    task.quantize("int8")
    embedding = task.backbone.token_embedding
    assert embedding.quantization_mode == "int8"
    assert {str(weight.dtype) for weight in embedding.weights} == {"int8", "float32"}


def test_a_loader_of_unknown_length_is_refused():
    data = pytest.importorskip("torch.utils.data")

    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter(["MKT", "AY"])

    for method in ("fit", "evaluate", "predict"):
        with pytest.raises(ValueError, match=r"a `__len__`.*dataset of type Stream"):
            getattr(make_task(), method)(data.DataLoader(Stream(), batch_size=2))
