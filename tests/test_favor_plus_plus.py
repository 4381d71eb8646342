"""FAVOR++: its statistics, its features, and the layer that keeps the statistics."""

import math

import keras
import numpy as np
import oracles
import pytest
from gradients import attend
from keras import ops
from samples import normal
from tolerances import assert_close, assert_exact, to_numpy

from keras_performer.feature_maps import ELU, FavorPlus, FavorPlusPlus, Hedgehog
from keras_performer.layers import PerformerAttention
from keras_performer.models import PerformerEncoderBackbone
from keras_performer.ops._chunked import CHUNK

pytestmark = pytest.mark.usefixtures("short_steps")

BATCH, LENGTH, HEADS, KEY_HEADS, HEAD_DIM, FEATURES = 2, 11, 6, 3, 7, 19
STATISTICS = ("query_mean", "query_square", "key_mean", "key_square")


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


# Its statistics.


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


# Its features.


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


# The layer that keeps the statistics.


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
@pytest.mark.parametrize("stack", ["plain", "remat", "reversible"])
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
