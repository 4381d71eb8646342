"""The embedding of genes and their expression, alone and under encoder blocks."""

import json

import keras
import numpy as np
import pytest
from gradients import call
from tolerances import assert_close, assert_exact, to_numpy

from keras_performer.layers import PerformerEncoderBlock
from keras_performer.models import GeneExpressionEmbedding

GENES = np.array([[3, 1, 7, 0, 0], [2, 5, 4, 6, 1]])
VALUES = np.array([[0.0, 0.5, 30.0, 9.0, 0.0], [1.0, 10.0, 11.0, 1e9, -1.0]], "float32")


def make_layer(**options):
    keras.utils.set_random_seed(0)
    options = {"num_genes": 7, "num_bins": 4, "hidden_dim": 6, "boundaries": [0, 1, 10], **options}
    return GeneExpressionEmbedding(**options)


def test_bins_by_hand():
    layer = make_layer()
    bins = [[0, 1, 3, 2, 0], [1, 2, 3, 3, 0]]
    assert to_numpy(layer.bins(VALUES)).tolist() == bins
    output = to_numpy(call(layer, GENES, VALUES))
    genes, levels = (to_numpy(w) for w in layer.weights)
    assert (genes.shape, levels.shape) == ((8, 6), (4, 6))
    expected = (genes[GENES] + levels[np.array(bins)]) * (GENES != 0)[..., None]
    assert_close(output, expected)


def test_default_bins_have_equal_width_on_the_log_scale_and_zero_has_its_own():
    layer = make_layer(boundaries=None, num_bins=6, max_expression=100.0)
    np.testing.assert_allclose(np.diff(np.log1p(layer.boundaries)), np.log(101) / 4, rtol=1e-5)
    assert layer.boundaries[0] == 0 and layer.boundaries[-1] == pytest.approx(100)
    values = np.array([[0.0, 1e-6, 2.0, 3.0, 50.0, 100.1, 1e9]], "float32")
    assert to_numpy(layer.bins(values)).tolist() == [[0, 1, 1, 2, 4, 5, 5]]
    for num_bins in (1, 2, 3):
        bins = to_numpy(make_layer(boundaries=None, num_bins=num_bins).bins(values))
        assert bins.min() == 0 and bins.max() == num_bins - 1


def test_values_are_not_rounded_under_mixed_precision():
    layer = make_layer(boundaries=[0, 1000.25, 1000.75], dtype="mixed_bfloat16")
    values = np.array([[1000.0, 1000.5, 1001.0]], "float32")
    output = layer(np.array([[1, 1, 1]]), values)
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    assert {w.dtype for w in layer.weights} == {"float32"}
    rows = to_numpy(output)[0]
    assert all(np.abs(rows[i] - rows[j]).max() > 0 for i, j in ((0, 1), (1, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_genes": 0}, "num_genes=0"),
        ({"num_bins": 0}, "num_bins=0"),
        ({"hidden_dim": 1.5}, "hidden_dim=1.5"),
        ({"max_expression": 0}, "max_expression=0"),
        ({"boundaries": [0, 1]}, "must be 3 increasing numbers"),
        ({"boundaries": [0, 2, 1]}, r"boundaries=\[0.0, 2.0, 1.0\]"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


def make_cell_model():
    genes = keras.Input((None,), dtype="int32", name="genes")
    values = keras.Input((None,), dtype="float32", name="values")
    x = make_layer()(genes, values)
    block = PerformerEncoderBlock(2, 9, num_features=8, rotary_max_wavelength=None, seed=1)
    x = keras.layers.GlobalAveragePooling1D()(block(x))
    return keras.Model({"genes": genes, "values": values}, keras.layers.Dense(3)(x))


def test_a_cell_is_a_set_and_padding_takes_no_part():
    model = make_cell_model()
    base = to_numpy(call(model, {"genes": GENES, "values": VALUES}))
    order = [1, 4, 0, 2, 3]
    shuffled = {"genes": GENES[:, order], "values": VALUES[:, order]}
    assert_close(call(model, shuffled), base, "layer")
    alone = {"genes": GENES[:1, :3], "values": VALUES[:1, :3]}
    assert_close(call(model, alone), base[:1], "layer")
    other = VALUES.copy()
    other[0, 3] = 77.0  # at padding
    assert_exact(call(model, {"genes": GENES, "values": other}), base)
    other[0, 0] = 77.0
    assert np.abs(to_numpy(call(model, {"genes": GENES, "values": other})) - base).max() > 1e-4


@pytest.mark.slow_on_jax
def test_trains_under_encoder_blocks_and_comes_back(tmp_path):
    model = make_cell_model()
    model.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
    x, y = {"genes": GENES, "values": VALUES}, np.ones((2, 3), "float32")
    before = [to_numpy(w) for w in model.trainable_weights]
    losses = [float(model.train_on_batch(x, y)) for _ in range(3)]
    assert losses[2] < losses[0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.abs(to_numpy(weight) - old).max() > 0, weight.path
    model.save(tmp_path / "cell.keras")
    loaded = keras.saving.load_model(tmp_path / "cell.keras")
    assert_exact(loaded(x), model(x))


def test_the_config_keeps_the_boundaries():
    layer = make_layer(boundaries=None, num_bins=9, max_expression=50)
    config = json.loads(json.dumps(layer.get_config()))
    twin = GeneExpressionEmbedding.from_config(config)
    assert twin.get_config() == layer.get_config()
    assert len(config["boundaries"]) == 8


def test_what_is_no_number_is_in_the_first_bin():
    bins = to_numpy(make_layer().bins(np.array([[np.nan, np.inf, -np.inf]], "float32")))
    assert bins.tolist() == [[0, make_layer().num_bins - 1, 0]]
