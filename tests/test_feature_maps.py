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
    FeatureMap,
    GeneralizedKernel,
    ReLU,
    default_num_features,
)

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
}


def built(feature_map, head_dim):
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


# Statistics. Blocks of one large projection are independent draws of a small one.


def pairs(head_dim, count=5, scale=0.5):
    """Scaled queries and keys, with |q' + k'|^2 about 2 scale^2 sqrt(H)."""
    return normal(count, head_dim, seed=1, scale=scale), normal(
        count, head_dim, seed=2, scale=scale
    )


def kernel(q, k):
    q, k = q.astype("float64"), k.astype("float64")
    return np.exp(np.sum(q * k, axis=-1) / math.sqrt(q.shape[-1]))


def estimates(feature_map, q, k, block):
    """Estimates of the kernel (pairs, draws), each from `block` features."""
    products = to_numpy(feature_map(q, is_query=True)).astype("float64") * to_numpy(feature_map(k))
    if feature_map.get_config().get("hyperbolic"):  # a row's two features make one estimate
        products = products.reshape(len(q), 2, -1).sum(axis=1)
        block //= 2
    return products.reshape(len(q), -1, block).sum(axis=-1) * (products.shape[-1] / block)


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
@pytest.mark.parametrize("hyperbolic", [False, True])
def test_kernel_estimate_is_unbiased(projection, hyperbolic):
    q, k = pairs(7)
    feature_map = FavorPlus(14 * 4001, projection=projection, hyperbolic=hyperbolic, seed=6)
    draws = estimates(feature_map, q, k, block=14)
    standard_error = draws.std(axis=1) / math.sqrt(draws.shape[1])
    truth = kernel(q, k)
    assert (standard_error < 0.05 * truth).all()  # else the next line would hide a bias
    assert (np.abs(draws.mean(axis=1) - truth) < STANDARD_ERRORS * standard_error).all()


def test_regularized_kernel_is_biased_below_by_as_much_as_theory_says():
    q, k = pairs(7, scale=1.0)
    draws = estimates(FavorPlus(200_003, projection="iid", regularized=True, seed=7), q, k, 1)
    standard_error = draws.std(axis=1) / math.sqrt(draws.shape[1])
    # The mean of exp(sqrt(H) u.z) over the sphere is 0F1(; H/2; H |z|^2 / 4).
    x, y = (t.astype("float64") * 7**-0.25 for t in (q, k))
    argument = 7 * np.sum((x + y) ** 2, axis=-1) / 4
    terms = [np.ones(len(q))]
    for i in range(60):
        terms.append(terms[-1] * argument / ((i + 1) * (3.5 + i)))
    truth = np.sum(terms, axis=0) * np.exp(-np.sum(x * x + y * y, axis=-1) / 2)
    assert (np.abs(draws.mean(axis=1) - truth) < STANDARD_ERRORS * standard_error).all()
    below = kernel(q, k) - draws.mean(axis=1)
    assert (below > 0).all()
    assert (below > STANDARD_ERRORS * standard_error).any()


def test_variance_of_iid_features_is_that_of_the_theory():
    # (exp(|q' + k'|^2) - 1) / M for M independent features: what `FavorPlus` documents.
    q, k = pairs(7, scale=0.4)
    draws = estimates(FavorPlus(400_009, projection="iid", seed=8), q, k, 1)
    squares = (draws / kernel(q, k)[:, None] - 1) ** 2
    f = np.sum((q.astype("float64") + k) ** 2, axis=-1) / math.sqrt(7)
    standard_error = squares.std(axis=1) / math.sqrt(squares.shape[1])
    assert (np.abs(squares.mean(axis=1) - (np.exp(f) - 1)) < STANDARD_ERRORS * standard_error).all()
    assert (standard_error < 0.05 * np.exp(f)).all()


def squared_errors(q, k, block, draws=20011, **options):
    feature_map = FavorPlus(block * draws, seed=9, **options)
    relative = estimates(feature_map, q, k, block) / kernel(q, k)[:, None] - 1
    return np.mean(relative**2, axis=0)  # over the pairs, one for each draw


@pytest.mark.parametrize(
    ("better", "worse", "num_features"),
    [
        ({"projection": "orthogonal"}, {"projection": "iid"}, 7),
        ({"projection": "iid", "hyperbolic": True}, {"projection": "iid"}, 14),
    ],
    ids=["orthogonal_below_iid", "hyperbolic_below_plain_for_short_vectors"],
)
def test_error_is_lower(better, worse, num_features):
    q, k = pairs(7, count=11, scale=0.3)
    low, high = (squared_errors(q, k, num_features, **options) for options in (better, worse))
    standard_error = math.sqrt((low.var() + high.var()) / low.size)
    assert high.mean() - low.mean() > STANDARD_ERRORS * standard_error


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_error_falls_with_the_square_root_of_features(projection):
    # Short vectors, and 24 draws of each size: the error itself has heavy tails.
    q, k = normal(11, 13, seed=1, scale=0.3), normal(17, 13, seed=2, scale=0.3)
    truth = np.exp(q.astype("float64") @ k.T / math.sqrt(13))
    sizes = [13, 52, 208, 832]
    errors = []
    for num_features in sizes:
        feature_map = FavorPlus(24 * num_features, projection=projection, seed=3)
        phi_q, phi_k = (to_numpy(feature_map(x)).reshape(-1, 24, num_features) for x in (q, k))
        estimate = 24 * np.einsum("tdm,sdm->dts", phi_q, phi_k)
        errors.append(math.sqrt(np.mean((estimate / truth - 1) ** 2)))
    slope, _ = np.polyfit(np.log(sizes), np.log(errors), 1)
    assert -0.6 < slope < -0.4


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


def test_an_unregistered_function_is_refused_at_loading():
    def fourth_power(x):
        return squared(squared(x))

    config = keras.saving.serialize_keras_object(GeneralizedKernel(fourth_power))
    with pytest.raises((TypeError, ValueError), match="fourth_power"):
        keras.saving.deserialize_keras_object(config)


def test_get_makes_new_maps():
    for name, cls in (("favor_plus", FavorPlus), ("relu", ReLU), ("elu", ELU)):
        assert type(feature_maps.get(name)) is cls
    by_name = feature_maps.get("relu", num_features=11, seed=3, dtype="float32")
    assert (by_name.num_features, by_name.seed) == (11, 3)
    original = built(FavorPlus(11, hyperbolic=False, regularized=True, seed=5), 7)
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
