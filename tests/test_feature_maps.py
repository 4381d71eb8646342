import json
import math

import keras
import numpy as np
import oracles
import pytest
from keras import ops
from samples import normal, squared
from tolerances import assert_close, assert_exact, to_numpy

from keras_performer import feature_maps
from keras_performer.feature_maps import (
    ELU,
    FavorPlus,
    FavorPlusPlus,
    FeatureMap,
    GeneralizedKernel,
    Hedgehog,
    ReLU,
    Trigonometric,
    default_num_features,
)
from keras_performer.ops import favor_attention
from keras_performer.ops.projections import simplex

STANDARD_ERRORS = 5


MAPS = {
    "favor_plus": lambda: FavorPlus(22, seed=3),
    "iid": lambda: FavorPlus(19, projection="iid", seed=3),
    "hyperbolic": lambda: FavorPlus(22, hyperbolic=True, seed=3),
    "regularized": lambda: FavorPlus(19, regularized=True, seed=3),
    "legacy": lambda: FavorPlus(19, legacy_epsilon=(1e-4, 1e-6), seed=3),
    "relu": lambda: ReLU(19, kernel_epsilon=1e-2, seed=3),
    "relu_plain": lambda: ReLU(projection=None),
    "elu": lambda: ELU(),
    "squared": lambda: GeneralizedKernel(squared, 19, projection="iid", scale_inputs=True, seed=3),
    "softplus": lambda: GeneralizedKernel("softplus", kernel_epsilon=0.0),
    "favor_plus_plus": lambda: FavorPlusPlus(19, projection="simplex", momentum=0.5, seed=3),
    "balanced": lambda: FavorPlusPlus(19, projection="iid", balanced=True, seed=3),
    "hedgehog": lambda: Hedgehog(),
    "trigonometric": lambda: Trigonometric(22, projection="simplex", seed=3),
    "trained_favor_plus": lambda: FavorPlus(19, trainable_projection=True, seed=3),
    "trained_hyperbolic": lambda: FavorPlus(22, hyperbolic=True, trainable_projection=True, seed=3),
    "trained_favor_plus_plus": lambda: FavorPlusPlus(
        19, balanced=True, trainable_projection=True, seed=3
    ),
    "trained_relu": lambda: ReLU(19, kernel_epsilon=1e-2, trainable_projection=True, seed=3),
    "trained_squared": lambda: GeneralizedKernel(
        squared, 19, projection="iid", scale_inputs=True, trainable_projection=True, seed=3
    ),
}


def built(feature_map, head_dim=7):
    feature_map.build((None, head_dim))
    return feature_map


def projection_of(feature_map, head_dim):
    return to_numpy(built(feature_map, head_dim).projection)


# Features.


@pytest.mark.parametrize("hyperbolic", [False, True])
@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_favor_plus_is_the_formula(projection, hyperbolic):
    feature_map = FavorPlus(22, projection=projection, hyperbolic=hyperbolic, seed=5)
    x = normal(2, 3, 5, 7)
    rows = projection_of(feature_map, 7)
    assert rows.shape == ((11, 7) if hyperbolic else (22, 7))
    expected = np.exp(oracles.favor_log_features(x, rows, hyperbolic=hyperbolic))
    for is_query in (False, True):
        assert_close(feature_map(x, is_query=is_query), expected)


def test_relu_and_generalized_are_the_formula():
    x = normal(2, 3, 7)
    relu = ReLU(11, kernel_epsilon=0.25, seed=1)
    rows = projection_of(relu, 7)
    assert_close(relu(x), np.maximum(x @ rows.T, 0) + 0.25)
    assert_close(ReLU(projection=None)(x), np.maximum(x, 0) + 1e-3)
    kernel = GeneralizedKernel(
        squared, 11, projection="orthogonal", scale_inputs=True, kernel_epsilon=0.5, seed=1
    )
    rows = projection_of(kernel, 7)
    assert_close(kernel(x), (x * 7**-0.25 @ rows.T) ** 2 + 0.5)
    assert_close(GeneralizedKernel(squared, kernel_epsilon=0.0)(x), x * x)


def test_elu_is_positive_where_elu_plus_one_rounds_to_zero():
    x = np.array([[-80.0, -20.0, -1.5, 0.0, 2.5]], "float32")
    phi = to_numpy(ELU()(x))
    assert (phi > 0).all()
    np.testing.assert_allclose(phi, [[*np.exp(x[0, :4].astype("float64")), 3.5]], rtol=1e-5)


@pytest.mark.parametrize("name", MAPS)
def test_shapes_are_announced(name):
    feature_map = MAPS[name]()
    announced = feature_map.compute_output_shape((2, None, 5, 7))
    assert announced[:3] == (2, None, 5)
    assert built(feature_map, 7).feature_dim == announced[-1]
    if feature_map.supports_state:
        assert feature_map(normal(2, 3, 5, 7)).shape[-1] == announced[-1]


def test_default_number_of_features():
    # H ln(H) = 0, 1.4, 16.6, 33.3, 266.2 and 621.1, rounded up to a multiple of eight.
    expected = {1: 8, 2: 8, 8: 24, 13: 40, 64: 272, 128: 624}
    assert {head_dim: default_num_features(head_dim) for head_dim in expected} == expected
    for cls in (FavorPlus, ReLU):
        assert projection_of(cls(), 13).shape == (40, 13)
    assert projection_of(FavorPlus(hyperbolic=True), 13).shape == (20, 13)


# Projections.


def test_rows_are_orthogonal_in_blocks():
    rows = projection_of(FavorPlus(24, seed=0), 7).astype("float64")  # three blocks and a part
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for start in range(0, 24, 7):
        block = directions[start : start + 7]
        np.testing.assert_allclose(block @ block.T, np.eye(len(block)), atol=1e-6)
    across = directions[:7] @ directions[7:14].T
    assert np.abs(across).max() > 0.2


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_rows_are_gaussian_vectors(projection):
    # A Gaussian vector has |w|^2 of mean H and variance 2H, and uniform directions: the signs of a
    # QR factor, left as they come, would make the diagonal of each block lean to one side.
    rows = projection_of(FavorPlus(7 * 997, projection=projection, seed=2), 7).astype("float64")
    squares = np.sum(rows**2, axis=1)
    for sample, mean in (
        (squares, 7.0),
        ((squares - 7.0) ** 2, 14.0),
        (rows.reshape(997, 7, 7)[:, range(7), range(7)].ravel(), 0.0),
        (rows.ravel(), 0.0),
        (rows.ravel() ** 2, 1.0),
        (rows[:, 0] * rows[:, 1], 0.0),
    ):
        standard_error = sample.std() / math.sqrt(sample.size)
        assert abs(sample.mean() - mean) < STANDARD_ERRORS * standard_error
    assert squares.std() > 1  # not the same norm for all


@pytest.mark.parametrize("head_dim", [2, 3, 7])
def test_simplex_directions_have_one_angle_in_each_block(head_dim):
    rows = simplex(3 * head_dim + head_dim // 2, head_dim, np.random.default_rng(0))
    assert rows.shape == (3 * head_dim + head_dim // 2, head_dim)
    directions = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for start in range(0, len(rows), head_dim):
        block = directions[start : start + head_dim]
        cosines = block @ block.T
        expected = np.where(np.eye(len(block)) > 0, 1.0, -1 / (head_dim - 1))
        np.testing.assert_allclose(cosines, expected, atol=1e-12)
        if len(block) == head_dim:
            np.testing.assert_allclose(block.sum(axis=0), 0.0, atol=1e-12)
    across = directions[:head_dim] @ directions[head_dim : 2 * head_dim].T
    assert np.abs(across + 1 / (head_dim - 1)).max() > 0.1  # each block has its own rotation


def test_simplex_rows_are_gaussian_vectors():
    rows = simplex(7 * 997, 7, np.random.default_rng(2))
    squares = np.sum(rows**2, axis=1)
    for sample, mean in (
        (squares, 7.0),
        ((squares - 7.0) ** 2, 14.0),
        (rows.reshape(997, 7, 7)[:, 0].ravel(), 0.0),  # every corner, not only their average
        (rows.reshape(997, 7, 7)[:, range(7), range(7)].ravel(), 0.0),
        (rows.ravel() ** 2, 1.0),
        (rows[:, 0] * rows[:, 1], 0.0),
    ):
        standard_error = sample.std() / math.sqrt(sample.size)
        assert abs(sample.mean() - mean) < STANDARD_ERRORS * standard_error


def test_simplex_rows_of_one_dimension_are_gaussian_numbers():
    rows = simplex(5003, 1, np.random.default_rng(0))
    assert abs(rows.mean()) < STANDARD_ERRORS / math.sqrt(5003)
    assert abs((rows**2).mean() - 1) < STANDARD_ERRORS * math.sqrt(2 / 5003)


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_regularized_rows_have_one_norm(projection):
    rows = projection_of(FavorPlus(23, projection=projection, regularized=True, seed=0), 7)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 7**0.5, rtol=1e-6)


def test_seed_decides_the_projection():
    first, again, other = (projection_of(FavorPlus(11, seed=s), 7) for s in (1, 1, 2))
    assert_exact(first, again)
    assert np.abs(first - other).max() > 0.1
    keras.utils.set_random_seed(4)
    first, other = projection_of(FavorPlus(11), 7), projection_of(FavorPlus(11), 7)
    keras.utils.set_random_seed(4)
    again = projection_of(FavorPlus(11), 7)
    assert_exact(first, again)
    assert np.abs(first - other).max() > 0.1


def test_projection_is_the_same_on_every_backend():
    # Numbers drawn once and written down; a saved seed has to mean the same features for ever.
    rows = projection_of(FavorPlus(16, seed=2009), 8)
    np.testing.assert_allclose(rows[0, :3], [1.4969684, -2.7596362, 0.15917234], rtol=1e-5)
    np.testing.assert_allclose(rows[9, 5:], [0.4495735, -3.0306382, 0.0891021], rtol=1e-5)
    rows = projection_of(ReLU(6, projection="iid", seed=14794), 8)
    np.testing.assert_allclose(rows[0, :3], [-2.0212615, -0.91147137, -0.9443753], rtol=1e-6)


def test_projection_is_a_saved_weight_that_is_not_trained():
    feature_map = built(FavorPlus(11, seed=0, dtype="mixed_bfloat16"), 7)
    assert [w.name for w in feature_map.non_trainable_weights] == ["projection"]
    assert feature_map.trainable_weights == []
    assert keras.backend.standardize_dtype(feature_map.projection.dtype) == "float32"
    assert_exact(feature_map.projection, projection_of(FavorPlus(11, seed=0), 7))
    half = built(FavorPlus(11, seed=0, dtype="bfloat16"), 7)
    assert keras.backend.standardize_dtype(half.projection.dtype) == "bfloat16"


# Redrawing.


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: FavorPlus(22, seed=seed),
        lambda seed: FavorPlus(22, hyperbolic=True, projection="simplex", seed=seed),
        lambda seed: FavorPlus(22, regularized=True, seed=seed),
        lambda seed: FavorPlusPlus(22, trainable_projection=True, seed=seed),
        lambda seed: ReLU(22, projection="iid", seed=seed),
        lambda seed: Trigonometric(22, seed=seed),
    ],
)
def test_redraw_is_a_new_draw_of_the_seed(make):
    feature_map = built(make(1))
    first = to_numpy(feature_map.projection).copy()
    feature_map.redraw(2)
    second = to_numpy(feature_map.projection).copy()
    assert_exact(second, built(make(2)).projection)
    assert np.abs(second - first).max() > 0.1
    feature_map.redraw(np.int64(1))
    assert_exact(feature_map.projection, first)
    assert feature_map.seed == 1


def test_redraw_needs_a_projection():
    for feature_map in (built(ELU()), built(Hedgehog()), built(ReLU(projection=None))):
        with pytest.raises(ValueError, match=r"random projection.*projection=None, built=True"):
            feature_map.redraw(1)
    with pytest.raises(ValueError, match=r"FavorPlus with projection='orthogonal', built=False"):
        FavorPlus(11).redraw(1)
    with pytest.raises(TypeError, match="integer"):
        built(FavorPlus(11)).redraw(None)


# Configuration.


@pytest.mark.parametrize("name", MAPS)
def test_config_round_trip_keeps_the_map(name):
    feature_map = MAPS[name]()
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(feature_map))
    assert type(twin) is type(feature_map)
    assert twin.get_config() == feature_map.get_config()
    if feature_map.supports_state:
        x = normal(3, 7)
        assert_exact(twin(x), feature_map(x))  # the seed draws the same projection
        assert feature_map.compute_output_shape((3, 7)) == tuple(feature_map(x).shape)


@pytest.mark.parametrize("name", [name for name in MAPS if name != "legacy"])
def test_saved_map_loads_bit_equal(name, tmp_path):
    config = MAPS[name]().get_config()
    if "seed" in config:
        config["seed"] = None  # so that the file has to carry the projection
    feature_map = type(MAPS[name]()).from_config(config)
    model = keras.Sequential([keras.Input((3, 7)), feature_map])
    model.save(tmp_path / "map.keras")
    loaded = keras.saving.load_model(tmp_path / "map.keras")
    x = normal(2, 3, 7)
    assert_exact(loaded(x), model(x))
    assert model.output_shape == (None, *model(x).shape[1:])


def test_config_has_every_argument():
    options = {"num_features": 11, "projection": "simplex", "seed": 2}
    adaptive = {"trainable_projection": True, "balanced": True, "momentum": 0.5}
    for made, given in (
        (FavorPlusPlus(**options, **adaptive), {**options, **adaptive}),
        (Trigonometric(22, projection="iid", seed=2), {"num_features": 22, "projection": "iid"}),
        (ELU(), {}),
        (Hedgehog(), {}),
    ):
        config = made.get_config()
        assert given.items() <= config.items()
        if not given:
            assert set(config) == {"name", "trainable", "dtype"}


def test_an_unregistered_function_is_refused_at_loading():
    def fourth_power(x):
        return squared(squared(x))

    config = keras.saving.serialize_keras_object(GeneralizedKernel(fourth_power))
    with pytest.raises((TypeError, ValueError), match="fourth_power"):
        keras.saving.deserialize_keras_object(config)


def test_get_makes_new_maps():
    classes = {"favor_plus": FavorPlus, "relu": ReLU, "elu": ELU, "hedgehog": Hedgehog}
    for name, cls in classes.items():
        assert type(feature_maps.get(name)) is cls
    for name, cls in (("relu", ReLU), ("favor_plus_plus", FavorPlusPlus)):
        by_name = feature_maps.get(name, num_features=11, seed=3, dtype="float32")
        assert type(by_name) is cls and (by_name.num_features, by_name.seed) == (11, 3)
    plain = FavorPlus(11, hyperbolic=False, regularized=True, seed=5)
    adaptive = FavorPlusPlus(11, balanced=True, seed=5)
    adaptive.build((None, None, 3, 7))
    adaptive.update_statistics(normal(2, 5, 6, 7), normal(2, 5, 3, 7))
    for original in (built(plain, 7), adaptive):
        for identifier in (original, keras.saving.serialize_keras_object(original)):
            copy = feature_maps.get(identifier)
            assert copy is not original and not copy.built
            assert copy.get_config() == original.get_config()
            assert built(copy, 7).projection is not original.projection
            assert_exact(copy.projection, original.projection)


@pytest.mark.parametrize(
    ("identifier", "options", "message"),
    [
        ("favor", {}, r"one of \['elu', 'favor_plus', .*'relu'\].*Received: feature_map='favor'"),
        (7, {}, r"or a FeatureMap.*Received: feature_map=7"),
        (keras.saving.serialize_keras_object(keras.layers.Dense(3)), {}, r"or a FeatureMap"),
        ("elu", {"num_features": 11}, r"num_features=None. Received: num_features=11"),
        ("hedgehog", {"num_features": 11}, r"num_features=None. Received: num_features=11"),
        (ELU(), {"num_features": 11}, r"own number of features.*num_features=11"),
        ("favor_plus", {"num_features": 0}, r"positive integer.*num_features=0"),
        ("relu", {"num_features": 2.5}, r"positive integer.*num_features=2.5"),
    ],
)
def test_get_explains_what_it_refuses(identifier, options, message):
    with pytest.raises(ValueError, match=message):
        feature_maps.get(identifier, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FavorPlus(projection=None), r"needs a projection.*projection=None"),
        (
            lambda: FavorPlus(projection="haar"),
            r"\['iid', 'orthogonal', 'simplex'\].*projection='haar'",
        ),
        (lambda: FavorPlus(11, hyperbolic=True), r"must be even. Received: num_features=11"),
        (lambda: FavorPlus(legacy_epsilon=-1e-6), r"a number >= 0.*legacy_epsilon=-1e-06"),
        (lambda: FavorPlus(legacy_epsilon=(1e-4, 1e-6, 0.0)), r"or a pair"),
        (lambda: FavorPlus(legacy_epsilon=(1e-4, "1e-6")), r"or a pair"),
        (lambda: FavorPlus(hyperbolic=True, legacy_epsilon=1e-6), r"hyperbolic=False or"),
        (lambda: ReLU(11, projection=None), r"num_features=None. Received: num_features=11"),
        (lambda: ReLU(kernel_epsilon=-1.0), r"must not be negative.*kernel_epsilon=-1.0"),
        (lambda: GeneralizedKernel(squared, 11), r"projection='orthogonal' or num_features=None"),
        (lambda: GeneralizedKernel(squared, kernel_epsilon=-1.0), r"must not be negative"),
        (lambda: GeneralizedKernel("tanh"), r"not negative.*fn='tanh'.*smallest value.* is -0\.99"),
        (lambda: GeneralizedKernel("gelu"), r"not negative.*fn='gelu'"),
        (lambda: GeneralizedKernel(ops.log), r"finite and not negative"),
        (lambda: GeneralizedKernel(ops.sum), r"an elementwise function"),
        (lambda: ReLU().build((3, None)), r"head size.*positive integer.*\(3, None\)"),
        (lambda: FavorPlusPlus(projection=None), r"FavorPlusPlus needs a projection.*'simplex'"),
        (lambda: FavorPlusPlus(momentum=1.0), r"below 1. Received: momentum=1.0"),
        (lambda: FavorPlusPlus(momentum=-0.1), r"at least 0.*momentum=-0.1"),
        (lambda: FavorPlusPlus(0), r"positive integer.*num_features=0"),
        (lambda: Trigonometric(projection=None), r"Trigonometric needs a projection"),
        (lambda: Trigonometric(11), r"must be even. Received: num_features=11"),
        (lambda: ReLU(projection=None, trainable_projection=True), r"no projection to train"),
        (lambda: GeneralizedKernel(squared, trainable_projection=True), r"no projection to train"),
        (lambda: Hedgehog().build((3, None)), r"head size.*positive integer.*\(3, None\)"),
    ],
)
def test_constructors_explain_what_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_epsilon_can_lift_a_function_that_dips_below_zero():
    assert (to_numpy(GeneralizedKernel("gelu", kernel_epsilon=0.25)(normal(3, 7))) > 0).all()


def test_the_interface_is_abstract():
    with pytest.raises(NotImplementedError):
        built(FeatureMap(), 7).features(normal(3, 7), (), is_query=False)


@pytest.mark.parametrize("make", [lambda: Hedgehog(), lambda: Trigonometric(22, seed=1)])
def test_exact_scores_do_not_stand_beside_other_kernels(make):
    x = normal(2, 11, 3, 7)
    with pytest.raises(ValueError, match="exact_window"):
        favor_attention(x, x, x, make(), exact_window=3)


def test_a_number_of_features_may_be_numpys():
    config = FavorPlus(np.int64(16)).get_config()
    assert json.dumps(config["num_features"]) == "16"
