import json

import keras
import numpy as np
import pytest
from tolerances import to_numpy

from keras_performer.feature_maps import FavorPlus
from keras_performer.layers import PerformerEncoderBlock

BACKEND = keras.config.backend()
NON_DEFAULT = {
    "num_heads": 4,
    "intermediate_dim": 13,
    "key_dim": 6,
    "num_key_value_heads": 2,
    "num_features": 17,
    "feature_map": "relu",
    "qk_norm": False,
    "rotary_max_wavelength": 500,
    "gated": True,
    "activation": "silu",
    "dropout": 0.2,
    "attention_dropout": 0.3,
    "layer_norm_epsilon": 1e-4,
    "use_bias": False,
    "kernel_initializer": "zeros",
    "attention": "sliding_window",
    "sliding_window": 5,
    "exact_window": 4,
    "num_sink_tokens": 1,
    "far_bias": -1.5,
    "remat": True,
    "seed": 3,
}


def make_block(**options):
    return PerformerEncoderBlock(
        **{"num_heads": 3, "intermediate_dim": 13, "key_dim": 4, "num_features": 17, **options}
    )


def inputs(batch=2, length=7, width=11, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, width)).astype("float32")


@pytest.mark.parametrize("gated", [False, True])
def test_output_has_the_shape_of_the_input(gated):
    block = make_block(gated=gated)
    assert tuple(block(inputs()).shape) == (2, 7, 11)
    assert block.compute_output_shape((None, None, 11)) == (None, None, 11)
    names = {weight.path.split("/")[-2] for weight in block.trainable_weights}
    assert ("feedforward_gate" in names) == gated


def test_functional_and_sequential_models_equal_the_layer():
    block = make_block()
    x = inputs()
    expected = to_numpy(block(x))
    symbol = keras.Input((None, 11))
    functional = keras.Model(symbol, block(symbol))
    sequential = keras.Sequential([keras.Input((None, 11)), block])
    for model in (functional, sequential):
        assert model.output_shape == (None, None, 11)
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow_on_jax
def test_padded_batch_equals_unpadded_rows():
    # Guards against masking values but not keys, and against norms over the padding.
    block = make_block(gated=True)
    x = inputs(length=7)
    lengths = [4, 7]
    mask = np.arange(7) < np.array(lengths)[:, None]
    x[~mask] = 1e3
    padded = to_numpy(block(x, padding_mask=mask))
    for row, length in enumerate(lengths):
        alone = to_numpy(block(x[row : row + 1, :length]))[0]
        np.testing.assert_allclose(padded[row, :length], alone, rtol=1e-5, atol=1e-5)
    assert np.abs(padded - to_numpy(block(x)))[0, :4].max() > 1e-3


def test_integer_padding_mask_is_a_boolean_one():
    block = make_block()
    x, mask = inputs(), np.array([[1, 1, 1, 0, 0, 0, 0], [1] * 7])
    np.testing.assert_array_equal(
        to_numpy(block(x, padding_mask=mask)), to_numpy(block(x, padding_mask=mask == 1))
    )


@pytest.mark.slow_on_jax
def test_keras_mask_is_used_and_handed_on():
    block = make_block()
    ids = np.array([[3, 1, 2, 0, 0], [1, 2, 3, 4, 5]])
    embedding = keras.layers.Embedding(6, 11, mask_zero=True)
    symbol = keras.Input((None,), dtype="int32")
    hidden = block(embedding(symbol))
    model = keras.Model(symbol, [hidden, keras.layers.GlobalAveragePooling1D()(hidden)])
    hidden, pooled = (to_numpy(y) for y in model(ids))
    alone = to_numpy(block(to_numpy(embedding(ids[:1, :3]))))
    np.testing.assert_allclose(hidden[:1, :3], alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pooled[:1], alone.mean(axis=1), rtol=1e-5, atol=1e-5)
    explicit = to_numpy(block(to_numpy(embedding(ids)), padding_mask=ids != 0))
    np.testing.assert_allclose(hidden, explicit, rtol=1e-5, atol=1e-5)


def test_keras_mask_and_padding_mask_both_count():
    block = make_block()
    x = inputs(length=5)
    keras_mask = np.array([[1, 1, 1, 1, 0]] * 2, bool)
    padding_mask = np.array([[0, 1, 1, 1, 1]] * 2, bool)
    masked = keras.layers.Masking(mask_value=9.0)
    marked = np.where(keras_mask[:, :, None], x, 9.0).astype("float32")
    both = to_numpy(block(masked(marked), padding_mask=padding_mask))
    expected = to_numpy(block(x, padding_mask=keras_mask & padding_mask))
    np.testing.assert_allclose(both[:, 1:4], expected[:, 1:4], rtol=1e-5, atol=1e-5)


@pytest.mark.slow_on_jax
def test_packed_segments_equal_separate_sequences():
    block = make_block()
    x = inputs(batch=1)
    segment_ids = np.array([[5, 5, 5, 2, 2, 2, 2]])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3]])
    packed = to_numpy(block(x, segment_ids=segment_ids, positions=positions))
    parts = [to_numpy(block(x[:, :3])), to_numpy(block(x[:, 3:]))]
    np.testing.assert_allclose(packed, np.concatenate(parts, axis=1), rtol=1e-4, atol=1e-5)


def test_positions_are_rotary_and_relative():
    block = make_block()
    x = inputs()
    plain = to_numpy(block(x))
    order = np.tile(np.arange(7), (2, 1))
    np.testing.assert_allclose(to_numpy(block(x, positions=order)), plain, rtol=1e-5, atol=1e-5)
    assert np.abs(to_numpy(block(x, positions=3 * order)) - plain).max() > 1e-4
    blind = make_block(rotary_max_wavelength=None)
    turned = to_numpy(blind(x[:, ::-1].copy()))[:, ::-1]
    np.testing.assert_allclose(turned, to_numpy(blind(x)), rtol=1e-5, atol=1e-5)
    assert np.abs(to_numpy(block(x[:, ::-1].copy()))[:, ::-1] - plain).max() > 1e-4


def test_residual_branches_are_pre_norm():
    # With every output kernel at zero the block is the identity: nothing normalises the residual.
    block = make_block(use_bias=False)
    x = 100 * inputs()
    block(x)
    for weight in block.trainable_weights:
        if "_output/" in weight.path:
            weight.assign(np.zeros(weight.shape))
    np.testing.assert_array_equal(to_numpy(block(x)), x)


def test_config_round_trip_keeps_every_argument():
    block = PerformerEncoderBlock(**NON_DEFAULT, name="block")
    config = json.loads(json.dumps(block.get_config()))
    for name, value in NON_DEFAULT.items():
        if name == "kernel_initializer":
            assert config[name]["class_name"] == "Zeros"
        else:
            assert config[name] == value, name
    twin = PerformerEncoderBlock.from_config(config)
    assert json.loads(json.dumps(twin.get_config())) == config
    x = inputs()
    for each in (block, twin):
        each(x)
    assert [w.shape for w in twin.weights] == [w.shape for w in block.weights]
    rng = np.random.default_rng(0)
    block.set_weights([rng.normal(size=w.shape) for w in block.weights])
    twin.set_weights(block.get_weights())
    np.testing.assert_array_equal(to_numpy(twin(x)), to_numpy(block(x)))


@pytest.mark.parametrize("feature_map", ["relu", FavorPlus(num_features=19, seed=2)])
def test_saved_model_loads_bit_equal(feature_map, tmp_path):
    num_features = 17 if feature_map == "relu" else None
    block = make_block(gated=True, feature_map=feature_map, num_features=num_features)
    model = keras.Sequential([keras.Input((None, 11)), block])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = inputs()
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def train(model, x, **options):
    model.compile(optimizer=keras.optimizers.SGD(1.0), loss="mse", **options)
    return model.fit(x, np.roll(x, 1, axis=1), epochs=1, batch_size=2, verbose=0)


def test_one_step_of_fit_reaches_every_trainable_weight():
    block = make_block(gated=True, num_heads=4, num_key_value_heads=2)
    model = keras.Sequential([keras.Input((None, 11)), block])
    before = [to_numpy(w) for w in model.trainable_weights]
    frozen = [to_numpy(w) for w in model.non_trainable_weights]
    # XLA where the backend has it; PyTorch's compiler takes a minute.
    train(model, inputs(), jit_compile=BACKEND != "torch")
    for weight, old in zip(model.trainable_weights, before, strict=True):
        new = to_numpy(weight)
        assert np.isfinite(new).all(), weight.path
        assert np.abs(new - old).max() > 0, weight.path
    for weight, old in zip(model.non_trainable_weights, frozen, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), old)


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights():
    block = make_block(dtype="mixed_bfloat16", gated=True)
    plain = make_block(gated=True)
    x = inputs()
    output = block(x)
    plain(x)
    plain.set_weights(block.get_weights())
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert {w.dtype for w in block.trainable_weights} == {"float32"}
    for layer in block._flatten_layers(include_self=False):
        if layer.trainable_weights:
            assert layer.dtype_policy.name == "mixed_bfloat16", layer.path
    expected = to_numpy(plain(x))
    error = np.sqrt(np.mean((to_numpy(output) - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < 1e-2


def test_dropout_acts_in_training_only_and_follows_the_seed():
    x = inputs()
    block, twin = (make_block(dropout=0.5, attention_dropout=0.2, seed=4) for _ in range(2))
    for each in (block, twin):
        each(x)
    twin.set_weights(block.get_weights())
    np.testing.assert_array_equal(to_numpy(block(x)), to_numpy(block(x, training=False)))
    noisy = to_numpy(block(x, training=True))
    assert np.abs(noisy - to_numpy(block(x))).max() > 1e-2
    np.testing.assert_array_equal(noisy, to_numpy(twin(x, training=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads=0"),
        ({"intermediate_dim": 1.5}, "intermediate_dim=1.5"),
        ({"num_features": -1}, "num_features=-1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout=-0.1"),
        ({"rotary_max_wavelength": 0}, "rotary_max_wavelength=0"),
        ({"key_dim": None}, "hidden_dim=11, num_heads=3"),
        ({"key_dim": 5}, "even head size"),
        ({"feature_map": "favour"}, "favour"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_block(**options)(inputs())


def test_wrong_rank_is_named():
    with pytest.raises(ValueError, match=r"\(batch, length, width\)"):
        make_block()(np.ones((2, 11), "float32"))
