"""FAVOR++, Hedgehog, trigonometric features, simplex rows, and projections redrawn or trained."""

import itertools
import math

import keras
import numpy as np
import oracles
import pytest
from gradients import attend, gradients
from keras import ops
from marks import slow_on_jax
from samples import normal, squared
from tolerances import assert_close, assert_exact, assert_gradients_close, to_numpy

from keras_performer import feature_maps
from keras_performer.feature_maps import (
    ELU,
    FavorPlus,
    FavorPlusPlus,
    GeneralizedKernel,
    Hedgehog,
    ReLU,
    Trigonometric,
)
from keras_performer.layers import PerformerAttention
from keras_performer.models import PerformerEncoderBackbone
from keras_performer.ops import favor_attention
from keras_performer.ops._chunked import CHUNK
from keras_performer.ops.projections import simplex

pytestmark = pytest.mark.usefixtures("short_steps")

STANDARD_ERRORS = 5
BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_DIM, FEATURES = 2, 11, 6, 3, 7, 19
STATISTICS = ("query_mean", "query_square", "key_mean", "key_square")


MAPS = {
    "favor_plus_plus": lambda: FavorPlusPlus(FEATURES, projection="simplex", momentum=0.5, seed=3),
    "balanced": lambda: FavorPlusPlus(FEATURES, projection="iid", balanced=True, seed=3),
    "hedgehog": lambda: Hedgehog(),
    "trigonometric": lambda: Trigonometric(22, projection="simplex", seed=3),
    "trained_favor_plus": lambda: FavorPlus(FEATURES, trainable_projection=True, seed=3),
    "trained_hyperbolic": lambda: FavorPlus(22, hyperbolic=True, trainable_projection=True, seed=3),
    "trained_favor_plus_plus": lambda: FavorPlusPlus(
        FEATURES, balanced=True, trainable_projection=True, seed=3
    ),
    "trained_relu": lambda: ReLU(FEATURES, kernel_epsilon=1e-2, trainable_projection=True, seed=3),
    "trained_squared": lambda: GeneralizedKernel(
        squared, FEATURES, projection="iid", scale_inputs=True, trainable_projection=True, seed=3
    ),
}
LEARNING = [name for name in MAPS if name.startswith("trained") or name == "hedgehog"]


def built(feature_map, head_dim=HEAD_DIM, key_heads=KEY_HEADS):
    feature_map.build((None, None, key_heads, head_dim))
    return feature_map


def make_qkv(length=LENGTH, *, seed=0, scale=1.0):
    """Queries and keys whose heads and dimensions differ in size and are not centred."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.2, 1.2, HEAD_DIM)
    heads = 1 + np.arange(KEY_HEADS)[:, None] / 2
    query = rng.standard_normal((BATCH, length, HEADS, HEAD_DIM)) * sizes
    key = rng.standard_normal((BATCH, length, KEY_HEADS, HEAD_DIM)) * sizes[::-1] * heads
    value = rng.standard_normal((BATCH, length, KEY_HEADS, 5))
    return tuple(x.astype("float32") for x in (scale * (query + 0.3), scale * (key + 0.2), value))


def adapted(feature_map):
    """The map, built, with statistics or weights that are no longer those it started with."""
    if not feature_map.built:
        built(feature_map)
    feature_map.update_statistics(*make_qkv(seed=5)[:2])
    if isinstance(feature_map, Hedgehog):
        weight = feature_map.learned_projection
        weight.assign(weight + normal(*weight.shape, seed=6, scale=0.3))
    return feature_map


def moments(query, key, key_mask=None, key_heads=KEY_HEADS):
    """The statistics of one batch in float64, (4, K, H) in the order of `STATISTICS`."""
    everything = np.ones(query.shape[:3], bool)
    kept = np.ones(key.shape[:3], bool) if key_mask is None else np.swapaxes(key_mask, 1, 2)
    result = []
    for x, mask in ((query, everything), (key, kept)):
        x, group = x.astype("float64") / x.shape[3] ** 0.25, x.shape[2] // key_heads
        heads = [slice(group * k, group * (k + 1)) for k in range(key_heads)]
        rows = [x[:, :, head][mask[:, :, head]] for head in heads]
        result += [[np.mean(r, axis=0) for r in rows], [np.mean(r**2, axis=0) for r in rows]]
    return np.array(result)


def statistics_of(feature_map):
    return np.array([to_numpy(getattr(feature_map, name)) for name in STATISTICS])


def constants(statistics, balanced):
    """A (K,) and Psi (K, H) by formulas 6 and 7, in float64."""
    x, x2, y, y2 = statistics.astype("float64")
    psi = (y2 / x2) ** 0.25 if balanced else np.ones_like(x)
    p = np.mean(psi**2 * x2 + y2 / psi**2 + 2 * x * y, axis=-1)
    return (1 - 2 * p - np.sqrt((2 * p + 1) ** 2 + 8 * p)) / 16, psi


def log_features(x, rows, a, psi, *, is_query):
    """Formula 6 for x (..., H), in float64."""
    x, rows = x.astype("float64") / x.shape[-1] ** 0.25, rows.astype("float64")
    x = x * psi if is_query else x / psi
    exponent = a * np.sum(rows**2, axis=1) + math.sqrt(1 - 4 * a) * x @ rows.T
    norm = np.sum(x * x, axis=-1, keepdims=True) / 2
    return exponent - norm + x.shape[-1] / 4 * math.log(1 - 4 * a) - math.log(len(rows)) / 2


# Simplex projections.


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


# Statistics of estimates. Blocks of one large projection are independent draws of a small one.


def pairs(head_dim, count, scale=1.0, seed=1):
    """Anisotropic queries and keys: large dimensions of the one are small in the other."""
    sizes = np.geomspace(0.1, scale, head_dim)
    query = normal(count, head_dim, seed=seed) * sizes
    return query.astype("float32"), (normal(count, head_dim, seed=seed + 1) * sizes[::-1]).astype(
        "float32"
    )


def fitted(feature_map, head_dim, scale=1.0):
    """The map built for one head, with the statistics of 4096 of the `pairs`."""
    built(feature_map, head_dim, key_heads=1)
    q, k = pairs(head_dim, 4096, scale, seed=11)
    feature_map.update_statistics(q[None, :, None], k[None, :, None])
    return feature_map


def kernel(q, k):
    return np.exp(np.sum(q.astype("float64") * k, axis=-1) / math.sqrt(q.shape[-1]))


def estimates(feature_map, q, k, num_rows):
    """Estimates of the kernel (pairs, draws), each from `num_rows` rows of the projection."""
    products = to_numpy(feature_map(q, is_query=True)).astype("float64") * to_numpy(feature_map(k))
    total = feature_map.projection.shape[0]
    products = products.reshape(len(q), -1, total).sum(axis=1)  # the features of one row
    return products.reshape(len(q), -1, num_rows).sum(axis=-1) * (total / num_rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: FavorPlus(m, projection="simplex", seed=6),
        lambda m: FavorPlus(2 * m, hyperbolic=True, projection="simplex", seed=6),
        lambda m: Trigonometric(2 * m, seed=6),
        lambda m: Trigonometric(2 * m, projection="simplex", seed=6),
        *(
            lambda m, p=projection, b=balanced: FavorPlusPlus(m, projection=p, balanced=b, seed=6)
            for projection in ("orthogonal", "iid", "simplex")
            for balanced in (False, True)
        ),
    ],
)
def test_kernel_estimate_is_unbiased(make):
    q, k = pairs(7, count=5)
    feature_map = fitted(make(14 * 4001), 7)
    draws = estimates(feature_map, q, k, num_rows=14)
    standard_error = draws.std(axis=1) / math.sqrt(draws.shape[1])
    truth = kernel(q, k)
    assert (standard_error < 0.05 * truth).all()  # else the next line would hide a bias
    assert (np.abs(draws.mean(axis=1) - truth) < STANDARD_ERRORS * standard_error).all()


@pytest.mark.parametrize("balanced", [False, True])
def test_variance_of_favor_plus_plus_is_that_of_the_theory(balanced):
    q, k = pairs(7, count=5)
    feature_map = fitted(FavorPlusPlus(400_009, projection="iid", balanced=balanced, seed=8), 7)
    draws = estimates(feature_map, q, k, 1)
    squares = (draws / kernel(q, k)[:, None] - 1) ** 2
    standard_error = squares.std(axis=1) / math.sqrt(squares.shape[1])
    (a,), (psi,) = constants(statistics_of(feature_map), balanced)
    assert a < -0.02  # far enough from FAVOR+ for the formulas to differ
    f = np.sum((q.astype("float64") * psi + k / psi) ** 2, axis=-1) / math.sqrt(7)
    variance = (1 - 4 * a) ** 7 * (1 - 8 * a) ** -3.5
    variance = variance * np.exp(2 * (1 - 4 * a) * f / (1 - 8 * a) - f) - 1
    assert (np.abs(squares.mean(axis=1) - variance) < STANDARD_ERRORS * standard_error).all()
    assert (standard_error < 0.05 * (variance + 1)).all()


def squared_errors(feature_map, q, k, num_rows):
    relative = estimates(feature_map, q, k, num_rows) / kernel(q, k)[:, None] - 1
    return np.mean(relative**2, axis=0)  # over the pairs, one for each draw


def test_errors_on_anisotropic_data_are_ordered():
    # FORMULAS.md gives 0.063 < 0.140 < 0.268 on data of its own, at these sizes.
    q, k = pairs(16, count=41, scale=0.8)
    errors = [
        squared_errors(fitted(make(16 * 4001), 16, scale=0.8), q, k, 16)
        for make in (
            lambda m: FavorPlusPlus(m, balanced=True, seed=9),
            lambda m: FavorPlusPlus(m, seed=9),
            lambda m: FavorPlus(m, seed=9),
        )
    ]
    for low, high in itertools.pairwise(errors):
        standard_error = math.sqrt((low.var() + high.var()) / low.size)
        assert high.mean() - low.mean() > STANDARD_ERRORS * standard_error


def test_simplex_rows_are_better_than_orthogonal_ones():
    q, k = normal(11, 7, seed=1, scale=0.3), normal(11, 7, seed=2, scale=0.3)
    low, high = (
        squared_errors(built(FavorPlus(7 * 8009, projection=p, seed=9)), q, k, 7)
        for p in ("simplex", "orthogonal")
    )
    standard_error = math.sqrt((low.var() + high.var()) / low.size)
    assert high.mean() - 2 * low.mean() > STANDARD_ERRORS * standard_error


# FAVOR++: its statistics.


def make_masks():
    mask = np.random.default_rng(2).random((BATCH, KEY_HEADS, LENGTH)) > 0.4
    return {"none": None, "rows": mask[:, 0], "heads": mask, "integers": mask[:, 0].astype("int32")}


@pytest.mark.parametrize("name", make_masks())
@pytest.mark.parametrize("key_heads", [1, KEY_HEADS])
def test_one_update_gives_the_statistics_of_the_batch(key_heads, name):
    query, key, _ = make_qkv()
    mask = make_masks()[name]
    kept = np.ones((BATCH, LENGTH), bool) if mask is None else mask.astype(bool)
    if kept.ndim == 2:
        kept = np.repeat(kept[:, None], KEY_HEADS, axis=1)
    spoiled = np.where(np.swapaxes(kept, 1, 2)[..., None], key, np.nan)
    feature_map = built(FavorPlusPlus(FEATURES), key_heads=key_heads)
    feature_map.update_statistics(query, spoiled, mask)
    assert statistics_of(feature_map).shape == (4, key_heads, HEAD_DIM)
    assert_close(statistics_of(feature_map), moments(query, key, kept, key_heads))
    assert int(to_numpy(feature_map.num_updates)) == 1


@pytest.mark.parametrize("momentum", [0.0, 0.7, 0.99])
def test_updates_are_averaged_without_bias(momentum):
    batches = [make_qkv(seed=seed, scale=1 + seed)[:2] for seed in range(3)]
    feature_map = built(FavorPlusPlus(FEATURES, momentum=momentum))
    for count in (1, 2, 3):
        feature_map.update_statistics(*batches[count - 1])
        weights = momentum ** np.arange(count - 1.0, -1.0, -1.0)
        seen = np.array([moments(*batch) for batch in batches[:count]])
        expected = np.tensordot(weights / weights.sum(), seen, axes=1)
        np.testing.assert_allclose(statistics_of(feature_map), expected, rtol=1e-4, atol=1e-5)
        assert int(to_numpy(feature_map.num_updates)) == count


def test_an_update_without_keys_or_with_infinities_is_skipped():
    query, key, _ = make_qkv()
    feature_map = built(FavorPlusPlus(FEATURES))
    nothing = np.ones((BATCH, KEY_HEADS, LENGTH), bool)
    nothing[:, 1] = False
    infinite = query.copy()
    infinite[0, 3, 2, 1] = np.inf
    for count in (0, 1):
        before = statistics_of(feature_map)
        feature_map.update_statistics(query, key, nothing)
        feature_map.update_statistics(infinite, key)
        assert_exact(statistics_of(feature_map), before)
        assert int(to_numpy(feature_map.num_updates)) == count
        feature_map.update_statistics(query, key)


def test_updates_of_other_heads_are_refused():
    feature_map = built(FavorPlusPlus(FEATURES))
    for query_heads, key_heads in ((6, 2), (4, 3)):
        query, key = (normal(2, 5, n, HEAD_DIM) for n in (query_heads, key_heads))
        message = rf"3 key heads.*key.shape=\(2, 5, {key_heads}, 7\)"
        with pytest.raises(ValueError, match=message):
            feature_map.update_statistics(query, key)


def test_other_maps_keep_no_statistics():
    query, key, _ = make_qkv()
    for feature_map in (built(ELU()), built(FavorPlus(FEATURES, seed=1)), built(Hedgehog())):
        before = [to_numpy(w).copy() for w in feature_map.weights]
        assert feature_map.update_statistics(query, key) is None
        for old, weight in zip(before, feature_map.weights, strict=True):
            assert_exact(weight, old)


@keras.saving.register_keras_serializable(package="keras_performer_tests")
class Observer(keras.layers.Layer):
    """Shows its inputs to a feature map in training, as attention does."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.feature_map = FavorPlusPlus(FEATURES, balanced=True, momentum=0.5, seed=1)

    def build(self, input_shape):
        self.feature_map.build(input_shape)
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, x, training=False):
        if training:
            self.feature_map.update_statistics(x * self.scale, x)
        return ops.sum(x * self.scale, axis=(1, 2, 3))


def test_statistics_move_in_a_compiled_training_step():
    x = make_qkv(seed=1)[1]
    data = np.concatenate([x, 2 * x])
    inputs = keras.Input((None, KEY_HEADS, HEAD_DIM))
    model = keras.Model(inputs, Observer()(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(data, np.zeros(len(data)), batch_size=BATCH, shuffle=False, verbose=0)
    feature_map = model.layers[1].feature_map
    expected = (moments(x, x) + 2 * moments(2 * x, 2 * x)) / 3
    assert_close(statistics_of(feature_map), expected)
    assert int(to_numpy(feature_map.num_updates)) == 2
    model.predict(data, verbose=0)
    assert int(to_numpy(feature_map.num_updates)) == 2


# FAVOR++: its features.


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("projection", ["orthogonal", "iid", "simplex"])
def test_without_an_update_favor_plus_plus_is_favor_plus(projection, balanced):
    query, key, _ = make_qkv()
    options = {"projection": projection, "seed": 4}
    plain = built(FavorPlus(FEATURES, **options))
    feature_map = built(FavorPlusPlus(FEATURES, balanced=balanced, **options))
    for x, is_query in ((query, True), (key, False)):
        x = ops.convert_to_tensor(np.swapaxes(x, 1, 2)[:, :KEY_HEADS])
        expected = plain.features(x, plain.operands(x, None), is_query=is_query)
        actual = feature_map.features(x, feature_map.operands(x, None), is_query=is_query)
        for a, e in zip(actual, expected, strict=True):
            assert_exact(a, e)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("is_query", [False, True])
def test_each_head_has_its_own_features(is_query, balanced):
    feature_map = adapted(FavorPlusPlus(FEATURES, balanced=balanced, seed=4))
    rows = to_numpy(feature_map.projection)
    a, psi = constants(statistics_of(feature_map), balanced)
    assert np.ptp(a) > 0.01
    for shape in ((2, KEY_HEADS, 5, HEAD_DIM), (2, KEY_HEADS, 2, 5, HEAD_DIM)):
        x = normal(*shape)
        expected = [
            log_features(x[:, k], rows, a[k], psi[k], is_query=is_query) for k in range(KEY_HEADS)
        ]
        phi = feature_map(x, is_query=is_query)
        np.testing.assert_allclose(np.log(to_numpy(phi)), np.stack(expected, axis=1), atol=2e-5)
    x = normal(5, HEAD_DIM)
    expected = log_features(x, rows, a.mean(), psi.mean(axis=0), is_query=is_query)
    phi = feature_map(x, is_query=is_query)
    np.testing.assert_allclose(np.log(to_numpy(phi)), expected, atol=2e-5)


def test_a_dimension_that_is_always_zero_is_not_balanced():
    query, key, _ = make_qkv()
    query[..., 2], key[..., 4] = 0, 0
    feature_map = built(FavorPlusPlus(FEATURES, balanced=True, seed=4))
    feature_map.update_statistics(query, key)
    x = np.swapaxes(key, 1, 2)
    _, _, psi = feature_map.operands(x, None)
    assert_exact(to_numpy(psi)[:, 0, [2, 4]], np.ones((KEY_HEADS, 2)))
    assert np.abs(to_numpy(psi)[:, 0, [0, 6]] - 1).min() > 0.1
    assert np.isfinite(to_numpy(feature_map(x))).all()


@pytest.mark.parametrize("make", [lambda: FavorPlusPlus(FEATURES, seed=4), lambda: Hedgehog()])
def test_heads_are_looked_for_on_axis_one(make):
    feature_map = built(make())
    with pytest.raises(ValueError, match=r"3 key heads.*axis 1.*Received: x of shape \(2, 5, 3, 7"):
        feature_map(normal(2, 5, KEY_HEADS, HEAD_DIM))
    one_for_all = built(make(), key_heads=None)
    assert one_for_all(normal(2, 5, KEY_HEADS, HEAD_DIM)).shape[-1] == feature_map.feature_dim


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_the_future_does_not_matter_to_favor_plus_plus(implementation):
    # Guards against statistics of the sequence at hand, as the papers take them.
    length, place = 2 * CHUNK + 37, CHUNK + 5
    query, key, value = make_qkv(length)
    changed = [x.copy() for x in (query, key, value)]
    for x in changed:
        x[:, place + 1 :] *= -3
    feature_map = adapted(FavorPlusPlus(FEATURES, balanced=True, seed=4))
    options = {"causal": True, "implementation": implementation}
    before = to_numpy(attend(query, key, value, feature_map, **options))
    after = to_numpy(attend(*changed, feature_map, **options))
    assert_exact(after[:, : place + 1], before[:, : place + 1])
    assert np.abs(after - before)[:, place + 1 :].max() > 0.1


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_favor_plus_plus_equals_a_float64_loop(causal, balanced):
    query, key, value = make_qkv()
    mask = make_masks()["rows"]
    mask[:, 0] = True
    feature_map = adapted(FavorPlusPlus(FEATURES, balanced=balanced, seed=4))
    rows = to_numpy(feature_map.projection)
    a, psi = constants(statistics_of(feature_map), balanced)
    group = HEADS // KEY_HEADS
    phi_q, phi_k = (
        np.stack(
            [
                log_features(x[:, :, n], rows, a[n // group], psi[n // group], is_query=is_query)
                for n in range(HEADS)
            ],
            axis=2,
        )
        for x, is_query in ((query, True), (np.repeat(key, group, axis=2), False))
    )
    expected = oracles.kernel_attention_loop(
        phi_q, phi_k, np.repeat(value, group, axis=2), causal=causal, key_mask=mask
    )
    output = attend(query, key, value, feature_map, causal=causal, key_mask=mask)
    assert_close(output, expected)


# Hedgehog.


def test_hedgehog_is_the_formula():
    feature_map = built(Hedgehog())
    assert_exact(
        feature_map.learned_projection, np.broadcast_to(np.eye(HEAD_DIM), (KEY_HEADS, 7, 7))
    )
    weights = to_numpy(adapted(feature_map).learned_projection).astype("float64")

    def softmax(x, weight):
        z = x.astype("float64") @ weight.T
        e = np.exp(np.concatenate([z, -z], axis=-1))
        return e / e.sum(axis=-1, keepdims=True)

    for shape in ((2, KEY_HEADS, 5, HEAD_DIM), (2, KEY_HEADS, 2, 5, HEAD_DIM)):
        x = normal(*shape)
        expected = [softmax(x[:, k], weights[k]) for k in range(KEY_HEADS)]
        for is_query in (False, True):
            assert_close(feature_map(x, is_query=is_query), np.stack(expected, axis=1))
    x = normal(5, HEAD_DIM)
    assert_close(feature_map(x), softmax(x, weights.mean(axis=0)))
    assert not feature_map.estimates_softmax


def test_hedgehog_holds_at_any_norm():
    query, key, value = make_qkv(scale=300.0)
    output = to_numpy(attend(query, key, value, adapted(Hedgehog()), causal=True))
    assert np.isfinite(output).all()
    assert_close(output[:, 0], np.repeat(value, HEADS // KEY_HEADS, axis=2)[:, 0])


# Learned projections.


@pytest.mark.parametrize("name", ["favor_plus_plus", *LEARNING])
@pytest.mark.parametrize("causal", [False, True])
def test_chunked_equals_reference(name, causal):
    """Outputs, and gradients by query, key, value and the projection."""
    feature_map = adapted(MAPS[name]())
    arrays = make_qkv(2 * CHUNK + 9)  # more than one step
    weights = list(feature_map.trainable_weights)
    assert len(weights) == (name in LEARNING)
    cotangent = normal(*arrays[0].shape[:3], 5, seed=8)  # the gradient by it is the output

    def run(implementation):
        def fn(cotangent, query, key, value, *values):
            with keras.StatelessScope(state_mapping=zip(weights, values, strict=True)):
                options = {"causal": causal, "implementation": implementation}
                output = favor_attention(query, key, value, feature_map, **options)
            return ops.sum(output * cotangent)

        return gradients(fn, cotangent, *arrays, *(to_numpy(w).copy() for w in weights))[1]

    (output, *grads), (expected, *expected_grads) = run("chunked"), run("reference")
    assert_close(output, expected)
    assert_gradients_close(grads, expected_grads)
    assert all(np.abs(grad).max() > 1e-3 for grad in grads)


@pytest.mark.parametrize("name", LEARNING)
def test_a_training_step_moves_what_is_trained(name):
    layer = PerformerAttention(4, HEAD_DIM, num_key_value_heads=2, feature_map=MAPS[name]())
    inputs = keras.Input((LENGTH, 5))
    model = keras.Model(inputs, layer(inputs, inputs))
    learned = layer.feature_map.trainable_weights
    assert [w.name for w in learned] in (["projection"], ["learned_projection"])
    before = to_numpy(learned[0]).copy()
    kept = [to_numpy(w).copy() for w in layer.feature_map.non_trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = normal(BATCH, LENGTH, 5)
    model.fit(x, x[:, ::-1], epochs=1, verbose=0)
    assert np.abs(to_numpy(learned[0]) - before).max() > 0
    if name != "trained_favor_plus_plus":  # whose statistics are the layer's to update
        assert kept == []


def test_only_a_projection_that_is_asked_for_is_trained():
    for feature_map in (FavorPlus(11), FavorPlusPlus(11), ReLU(11)):
        assert built(feature_map).trainable_weights == []
    assert FavorPlus(11, trainable_projection=True).get_config()["trainable_projection"] is True


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


# Trigonometric features.


def test_trigonometric_features_are_the_formula():
    feature_map = built(Trigonometric(22, seed=3))
    rows = to_numpy(feature_map.projection).astype("float64")
    assert rows.shape == (11, HEAD_DIM)
    x = normal(2, 3, 5, HEAD_DIM)
    scaled = x.astype("float64") / HEAD_DIM**0.25
    waves = np.concatenate([np.cos(scaled @ rows.T), np.sin(scaled @ rows.T)], axis=-1)
    expected = np.exp(np.sum(scaled**2, axis=-1, keepdims=True) / 2) * waves / math.sqrt(11)
    for is_query in (False, True):
        assert_close(feature_map(x, is_query=is_query), expected)


def test_trigonometric_attention_fails_as_its_docstring_says():
    query, key, value = make_qkv(scale=2.0)
    feature_map = built(Trigonometric(6, seed=3))
    group = HEADS // KEY_HEADS
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    phi_q, phi_k = (to_numpy(feature_map(x)).astype("float64") for x in (query, key))
    weights = np.einsum("btnm,bsnm->bnts", phi_q, phi_k)
    total = np.swapaxes(weights.sum(axis=-1), 1, 2)[..., None]
    assert weights.min() < 0 and total.min() < 0
    output = to_numpy(attend(query, key, value, feature_map, implementation="chunked"))
    expected = np.einsum("bnts,bsnv->btnv", weights, value) / total
    assert_exact(output[total[..., 0] < 0], 0.0)
    safe = total[..., 0] > 0.05 * np.abs(weights).sum(axis=-1).swapaxes(1, 2)
    assert 0 < safe.sum() < safe.size
    np.testing.assert_allclose(output[safe], expected[safe], rtol=1e-3, atol=1e-4)
    assert np.abs(output).max() > 2 * np.abs(value).max()  # not an average of values


# Configuration.


@pytest.mark.parametrize("name", MAPS)
def test_config_round_trip_keeps_the_map(name):
    feature_map = MAPS[name]()
    twin = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(feature_map))
    assert type(twin) is type(feature_map)
    assert twin.get_config() == feature_map.get_config()
    x = normal(3, HEAD_DIM)
    assert_exact(twin(x), feature_map(x))
    assert feature_map.compute_output_shape((3, HEAD_DIM)) == tuple(feature_map(x).shape)


@pytest.mark.parametrize("name", MAPS)
def test_saved_layer_loads_bit_equal(name, tmp_path):
    """The file carries the statistics and the learned matrices: nothing here has a seed."""
    feature_map = MAPS[name]()
    config = {k: v for k, v in feature_map.get_config().items() if k != "seed"}
    layer = PerformerAttention(
        HEADS, HEAD_DIM, num_key_value_heads=KEY_HEADS, feature_map=type(feature_map)(**config)
    )
    inputs = keras.Input((LENGTH, 5))
    model = keras.Model(inputs, layer(inputs, inputs))
    layer.feature_map.update_statistics(*make_qkv(seed=5)[:2])
    for weight in layer.feature_map.trainable_weights:
        weight.assign(weight + normal(*weight.shape, scale=0.1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        assert_exact(theirs, to_numpy(ours))
    if isinstance(feature_map, FavorPlusPlus):
        assert np.abs(statistics_of(loaded.layers[1].feature_map)).min() > 0
        assert int(to_numpy(loaded.layers[1].feature_map.num_updates)) == 1
    x = normal(BATCH, LENGTH, 5)
    assert_exact(loaded(x), model(x))


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


def test_get_makes_the_new_maps():
    made = feature_maps.get("favor_plus_plus", num_features=11, seed=3)
    assert type(made) is FavorPlusPlus and (made.num_features, made.seed) == (11, 3)
    assert type(feature_maps.get("hedgehog")) is Hedgehog
    original = adapted(FavorPlusPlus(11, balanced=True, seed=5))
    copy = feature_maps.get(original)
    assert not copy.built and copy.get_config() == original.get_config()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: feature_maps.get("hedgehog", num_features=11),
            r"=None. Received: num_features=11",
        ),
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


@pytest.mark.parametrize("make", [lambda: Hedgehog(), lambda: Trigonometric(22, seed=1)])
def test_exact_scores_do_not_stand_beside_other_kernels(make):
    query, key, value = make_qkv()
    with pytest.raises(ValueError, match="exact_window"):
        favor_attention(query, key, value, make(), exact_window=3)


# The layer that keeps the statistics.


@pytest.mark.parametrize("stack", ["plain", *slow_on_jax("remat", "reversible")])
def test_training_steps_move_the_statistics_once_each(stack):
    """Guards against statistics that recomputation in the backward pass moves a second time."""
    keras.utils.set_random_seed(1)
    backbone = PerformerEncoderBackbone(
        vocabulary_size=11,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        feature_map=FavorPlusPlus(16, balanced=True, seed=2),
        remat=stack == "remat",
        reversible=stack == "reversible",
        seed=1,
    )
    model = keras.Model(backbone.input, keras.layers.Dense(1)(backbone.output))
    model.compile("sgd", "mse")
    ids = np.random.default_rng(0).integers(0, 11, size=(12, 7))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    model.predict(inputs, batch_size=4, verbose=0)
    maps = [layer.self_attention.feature_map for layer in backbone.transformer_layers]
    assert [int(to_numpy(m.num_updates)) for m in maps] == [0, 0]
    model.fit(inputs, np.ones((12, 7, 1)), batch_size=4, epochs=2, verbose=0)
    assert [int(to_numpy(m.num_updates)) for m in maps] == [6, 6]
    assert tuple(maps[0].key_square.shape) == (2, 2)
    assert (to_numpy(maps[0].key_square) > 0).all()
    before = [to_numpy(m.key_square) for m in maps]
    model.evaluate(inputs, np.ones((12, 7, 1)), verbose=0)
    for m, old in zip(maps, before, strict=True):
        assert_exact(m.key_square, old)


def test_a_training_step_does_not_see_its_own_statistics():
    """Causal training: the first pass, before any update, is that of FAVOR+."""
    x = np.random.default_rng(0).standard_normal((2, 9, 8)).astype("float32")
    options = {"num_heads": 2, "key_dim": 4, "seed": 3}
    plain = PerformerAttention(feature_map=FavorPlus(16, seed=2), **options)
    adaptive = PerformerAttention(feature_map=FavorPlusPlus(16, seed=2), **options)
    expected = plain(x, x, use_causal_mask=True, training=True)
    adaptive.build(x.shape, x.shape)
    for ours, theirs in zip(adaptive._projections(), plain._projections(), strict=True):
        ours.set_weights(theirs.get_weights())
    assert_close(adaptive(x, x, use_causal_mask=True, training=True), expected, "layer")
    assert int(to_numpy(adaptive.feature_map.num_updates)) == 1
    after = adaptive(x, x, use_causal_mask=True, training=True)
    assert np.abs(to_numpy(after) - to_numpy(expected)).max() > 1e-4
