"""Callbacks through `fit`, and the figures of attention health against loops in NumPy."""

import importlib.util
import math
import warnings

import keras
import numpy as np
import oracles
import pytest
from marks import slow_on_jax
from processes import run_code
from samples import normal, squared
from tolerances import assert_close, assert_exact, to_numpy

from keras_performer.callbacks import AttentionHealth, RedrawFeatures
from keras_performer.callbacks._health import attention_health
from keras_performer.feature_maps import (
    FavorPlus,
    FavorPlusPlus,
    FeatureMap,
    GeneralizedKernel,
    ReLU,
    Trigonometric,
)
from keras_performer.layers import PerformerAttention, PerformerEncoderBlock
from keras_performer.layers._recording import record_attention
from keras_performer.models import PerformerDecoderBackbone, PerformerSeq2SeqBackbone
from keras_performer.ops import favor_attention_weights

BACKEND = keras.config.backend()
BATCH, LENGTH, KEY_LENGTH, HEADS, KEY_HEADS, HEAD_DIM, FEATURES = 2, 17, 13, 6, 3, 5, 7
WIDTH = 12
SINGLE_STEPS = pytest.mark.skipif(
    BACKEND == "torch", reason="Keras allows steps_per_execution=1 only on PyTorch"
)
# Features are float32, and an error is a small difference of them.
HEALTH = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def fixed_seed():
    keras.utils.set_random_seed(8)


def queries_and_keys(key_length=LENGTH, scale=0.7):
    query = normal(BATCH, LENGTH, HEADS, HEAD_DIM, seed=1, scale=scale)
    return query, normal(BATCH, key_length, KEY_HEADS, HEAD_DIM, seed=2, scale=scale)


def favor_plus(**options):
    feature_map = FavorPlus(FEATURES, seed=3, **options)
    feature_map.build((None, None, KEY_HEADS, HEAD_DIM))
    return feature_map


def favor_features(feature_map, x):
    return np.exp(oracles.favor_log_features(x, to_numpy(feature_map.projection)))


def health_loop(query, key, phi_q, phi_k, **options):
    """The figures from their formulas, one pair of tokens at a time; features (B, L, heads, M)."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    causal, masks = options.get("causal"), options.get("key_mask")
    ids, width = options.get("segment_ids"), options.get("exact_window")
    (batch, length, num_heads, head_dim), num_keys = query.shape, key.shape[1]
    self_attention, group = length == num_keys, num_heads // key.shape[2]
    runs = oracles.segment_runs(np.zeros((batch, num_keys)) if ids is None else ids)

    def takes_part(b, s, j):
        if masks is None:
            return True
        return bool(masks[b, s] if np.ndim(masks) == 2 else masks[b, j, s])

    def position(b, s):
        same = [r for r in range(num_keys) if runs[b, r] == runs[b, s]]
        first = [r for r in same if any(takes_part(b, r, j) for j in range(key.shape[2]))]
        return s - (first[0] if first else s)

    def is_near(b, t, s):
        blocks = [position(b, i) // (width or 64) for i in (t, s)]
        return abs(blocks[0] - blocks[1]) <= 1 or position(b, s) < options.get("num_sink_tokens", 0)

    def row(b, t, n, seen):
        q, j = query[b, t, n], n // group
        kernel = {s: math.exp(q @ key[b, s, j] / head_dim**0.5) for s in seen}
        estimate = {s: phi_q[b, t, n] @ phi_k[b, s, j] for s in seen}
        near = [s for s in seen if self_attention and is_near(b, t, s)]
        far = [s for s in seen if s not in near] if width else seen
        factor = math.exp(options["far_bias"][j]) if "far_bias" in options else 1.0
        target = {s: kernel[s] * factor if s in far else kernel[s] for s in seen}
        weight = {s: target[s] / sum(target.values()) for s in seen}
        score = {s: estimate[s] * factor if s in far else kernel[s] for s in seen}
        carried = [
            phi_q[b, t, n, i] * sum(phi_k[b, s, j, i] for s in far) for i in range(phi_q.shape[3])
        ]
        norms = {s: np.sum((q + key[b, s, j]) ** 2) / head_dim**0.5 for s in seen}
        figures = {
            "relative_variance": sum(
                weight[s] * (math.exp(norms[s]) - 1) / phi_q.shape[3] for s in far
            ),
            "measured_relative_variance": sum(
                weight[s] * (estimate[s] / kernel[s] - 1) ** 2 for s in far
            ),
            "total_variation": sum(
                abs(weight[s] - score[s] / sum(score.values())) / 2 for s in seen
            ),
            "effective_features": (sum(carried) ** 2 / sum(u * u for u in carried) if far else 0.0),
        }
        if self_attention:
            figures["window_share"] = sum(weight[s] for s in near)
        return figures

    found = {}
    for n in range(num_heads):
        rows = []
        for b, t in np.ndindex(batch, length):
            if self_attention and not takes_part(b, t, n // group):
                continue
            seen = [s for s in range(num_keys) if takes_part(b, s, n // group)]
            seen = [s for s in seen if not (causal and s > t)]
            if self_attention:
                seen = [s for s in seen if runs[b, s] == runs[b, t]]
            if seen:
                rows.append(row(b, t, n, seen))
        for name in rows[0]:
            found.setdefault(name, []).append(np.mean([figures[name] for figures in rows]))
    return found


def assert_same_figures(actual, expected):
    assert set(actual) == set(expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], err_msg=name, **HEALTH)


def left_padding():
    return np.arange(LENGTH) >= np.array([[5], [0]])


def per_head_mask():
    mask = np.random.default_rng(4).random((BATCH, KEY_HEADS, LENGTH)) < 0.6
    mask[0, :, :3] = False
    return mask


SEGMENTS = np.repeat([[5, 7, 5], [1, 1, 2]], [4, 7, 6], axis=1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_mask": left_padding()},
        {"key_mask": per_head_mask(), "exact_window": 3},
        {"segment_ids": SEGMENTS},
        {"exact_window": 2, "far_bias": np.array([-1.0, 0.5, 0.0])},
        {"exact_window": 2, "num_sink_tokens": 3, "key_mask": left_padding()},
        {"exact_window": 2, "segment_ids": SEGMENTS, "key_mask": left_padding()},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_health_is_that_of_a_loop_over_pairs(causal, options):
    query, key = queries_and_keys()
    feature_map = favor_plus()
    options = {**options, "causal": causal}
    phi = [favor_features(feature_map, x) for x in (query, key)]
    expected = health_loop(query, key, *phi, **options)
    assert_same_figures(attention_health(query, key, feature_map, **options), expected)


def test_health_of_cross_attention():
    query, key = queries_and_keys(KEY_LENGTH)
    mask = np.arange(KEY_LENGTH) < np.array([[7], [13]])
    feature_map = favor_plus()
    phi = [favor_features(feature_map, x) for x in (query, key)]
    expected = health_loop(query, key, *phi, key_mask=mask)
    assert "window_share" not in expected
    assert_same_figures(attention_health(query, key, feature_map, key_mask=mask), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_maps_that_do_not_estimate_softmax_have_two_figures(causal):
    query, key = queries_and_keys()
    feature_map = ReLU(FEATURES, seed=3)
    feature_map.build((None, HEAD_DIM))
    rows = to_numpy(feature_map.projection).astype("float64")
    phi = [np.maximum(x @ rows.T, 0) + 1e-3 for x in (query, key)]
    expected = health_loop(query, key, *phi, causal=causal)
    kept = {name: expected[name] for name in ("total_variation", "effective_features")}
    assert_same_figures(attention_health(query, key, feature_map, causal=causal), kept)


def test_estimates_below_zero_have_no_weight():
    query, key = queries_and_keys()
    feature_map = Trigonometric(8, seed=3)
    feature_map.build((None, HEAD_DIM))
    weights = to_numpy(favor_attention_weights(query, key, feature_map))
    assert (weights == 0).any()
    softmax = np.exp(np.einsum("btjgh,bsjh->bjgts", query.reshape(2, 17, 3, 2, 5), key) / 5**0.5)
    softmax = (softmax / softmax.sum(-1, keepdims=True)).reshape(weights.shape)
    expected = 0.5 * np.abs(softmax - weights).sum(-1).mean((0, 2))
    figures = attention_health(query, key, feature_map)
    np.testing.assert_allclose(figures["total_variation"], expected, **HEALTH)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_variance_of_favor_plus_plus_follows_its_averages(balanced, per_head):
    """Formula 6 of FORMULAS.md, with p and Psi from the statistics of the very same tokens."""
    query, key = queries_and_keys()
    query = query * np.linspace(0.2, 2, HEAD_DIM).astype("float32")
    feature_map = FavorPlusPlus(FEATURES, balanced=balanced, seed=3)
    feature_map.build((None, None, KEY_HEADS, HEAD_DIM) if per_head else (None, HEAD_DIM))
    feature_map.update_statistics(query, key)
    group, expected = HEADS // KEY_HEADS, []
    for n in range(HEADS):
        j = n // group
        x, y = query[:, :, n] / HEAD_DIM**0.25, key[:, :, j] / HEAD_DIM**0.25
        xs, ys = query / HEAD_DIM**0.25, key / HEAD_DIM**0.25
        if per_head:
            xs, ys = xs[:, :, j * group : (j + 1) * group], ys[:, :, j : j + 1]
        xs, ys = xs.reshape(-1, HEAD_DIM), ys.reshape(-1, HEAD_DIM)
        psi = np.ones(HEAD_DIM)
        if balanced:
            psi = (np.mean(ys**2, 0) / np.mean(xs**2, 0)) ** 0.25
        x, xs, y, ys = x * psi, xs * psi, y / psi, ys / psi
        mixed = np.mean(xs, 0) @ np.mean(ys, 0)
        p = (np.mean(np.sum(xs**2, -1)) + np.mean(np.sum(ys**2, -1)) + 2 * mixed) / HEAD_DIM
        a = (1 - 2 * p - math.sqrt((2 * p + 1) ** 2 + 8 * p)) / 16
        f = np.sum((x[:, :, None] + y[:, None]) ** 2, -1)
        inner = np.exp(2 * (1 - 4 * a) * f / (1 - 8 * a) - f)
        variance = ((1 - 4 * a) ** HEAD_DIM * (1 - 8 * a) ** (-HEAD_DIM / 2) * inner - 1) / FEATURES
        weights = np.exp(np.einsum("bth,bsh->bts", x, y))
        weights /= weights.sum(-1, keepdims=True)
        expected.append((weights * variance).sum(-1).mean())
    actual = attention_health(query, key, feature_map)["relative_variance"]
    np.testing.assert_allclose(actual, expected, rtol=1e-3)


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("kind", ["favor_plus", "favor_plus_plus"])
def test_measured_variance_averages_to_the_formula(kind):
    query, key = (normal(1, 3, 1, 4, seed=seed, scale=0.4) for seed in (1, 2))
    if kind == "favor_plus":
        feature_map = FavorPlus(8, projection="iid")
    else:
        feature_map = FavorPlusPlus(8, projection="iid", balanced=True)
    feature_map.build((None, None, 1, 4))
    feature_map.update_statistics(query, key)
    measured = []
    for seed in range(400):
        feature_map.redraw(seed)
        figures = attention_health(query, key, feature_map)
        measured.append(figures["measured_relative_variance"][0])
    standard_error = np.std(measured) / len(measured) ** 0.5
    assert standard_error < 0.1 * np.mean(measured)
    assert abs(np.mean(measured) - figures["relative_variance"][0]) < 5 * standard_error


def test_trained_projections_have_no_formula():
    query, key = queries_and_keys()
    figures = attention_health(query, key, favor_plus(trainable_projection=True))
    assert "measured_relative_variance" in figures
    assert "relative_variance" not in figures


def test_what_a_masked_key_holds_does_not_matter():
    query, key = queries_and_keys()
    feature_map, mask = favor_plus(), left_padding()
    expected = attention_health(query, key, feature_map, key_mask=mask)
    query[~mask], key[~mask] = np.nan, np.nan
    figures = attention_health(query, key, feature_map, key_mask=mask)
    for name in expected:
        assert np.isfinite(expected[name]).all()
        assert_exact(figures[name], expected[name])


def test_a_head_without_keys_has_no_figures():
    query, key = queries_and_keys()
    mask = np.ones((BATCH, KEY_HEADS, LENGTH), bool)
    mask[:, 1] = False
    mask[1] = False
    for name, values in attention_health(query, key, favor_plus(), key_mask=mask).items():
        assert_exact(np.isnan(values), np.array([False, False, True, True, False, False])), name


@pytest.mark.parametrize("scale", [8.0, 60.0])
def test_large_norms_are_told_and_not_hidden(scale):
    """One token, whose weight is 1: the formula by hand, infinite where it is beyond float64."""
    query = np.full((1, 1, 1, 4), 0.5 * scale, "float32")
    feature_map = FavorPlus(8, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        figures = attention_health(query, query, feature_map)
    square = 4 * scale**2 / 2
    expected = (math.exp(square) - 1) / 8 if square < 700 else np.inf
    np.testing.assert_allclose(figures["relative_variance"], [expected], rtol=1e-5)
    np.testing.assert_allclose(figures["total_variation"], [0.0])
    # Nearly every draw misses by nearly everything.
    np.testing.assert_allclose(figures["measured_relative_variance"], [1.0], atol=0.1)


def test_a_sample_of_queries_sees_every_key():
    """All queries are alike, so a sample of them has the figures of all, unless it lacks keys."""
    query, key = queries_and_keys()
    query[:] = query[:1, :1]
    feature_map = favor_plus()
    expected = attention_health(query, key, feature_map)
    del expected["window_share"]
    for max_tokens in (1, 6, 17):
        figures = attention_health(query, key, feature_map, max_tokens=max_tokens)
        del figures["window_share"]
        assert_same_figures(figures, expected)


def test_a_sample_is_of_some_queries_and_the_same_each_time():
    query, key = queries_and_keys()
    options = {"causal": True, "key_mask": left_padding()}
    whole = attention_health(query, key, favor_plus(), **options)
    assert_same_figures(attention_health(query, key, favor_plus(), **options, max_tokens=17), whole)
    sample = attention_health(query, key, favor_plus(), **options, max_tokens=10)
    again = attention_health(query, key, favor_plus(), **options, max_tokens=10)
    for name in ("relative_variance", "effective_features", "total_variation"):
        assert_exact(sample[name], again[name])
        assert np.abs(sample[name] - whole[name]).min() > 1e-3
        assert np.isfinite(sample[name]).all()


def test_half_precision_tensors_are_measured():
    query, key = (keras.ops.cast(x, "bfloat16") for x in queries_and_keys())
    expected = attention_health(to_numpy(query), to_numpy(key), favor_plus())
    assert_same_figures(attention_health(query, key, favor_plus()), expected)


# === Recording ===


@pytest.mark.slow_on_jax
def test_recorded_queries_and_keys_are_what_attention_compares():
    """Rotated and normalised: they give the very weights that the layer returns."""
    layer = PerformerAttention(
        4, 6, num_key_value_heads=2, qk_norm=True, rotary_max_wavelength=100, num_features=FEATURES
    )
    x, mask = normal(BATCH, LENGTH, WIDTH), left_padding()
    options = {"use_causal_mask": True, "segment_ids": SEGMENTS, "key_mask": mask}
    with record_attention() as records:
        _, scores = layer(x, x, return_attention_scores=True, **options)
    ((recorded, query, key, key_mask, causal, segment_ids),) = records
    assert recorded is layer
    weights = favor_attention_weights(
        query, key, layer.feature_map, causal=causal, key_mask=key_mask, segment_ids=segment_ids
    )
    assert_exact(weights, scores)
    assert np.abs(to_numpy(weights)[:, :, -1]).max() > 0


@pytest.mark.slow_on_jax
def test_nothing_is_recorded_outside_of_the_context():
    layer = PerformerAttention(2, 4, num_features=FEATURES)
    x = normal(1, 3, 6)
    with record_attention() as outer:
        layer(x, x)
        with record_attention() as inner:
            layer(x, x)
        layer(x, x)
    layer(x, x)
    assert (len(outer), len(inner)) == (2, 1)
    with pytest.raises(KeyError), record_attention() as failed:
        raise KeyError
    layer(x, x)
    assert failed == []


# === Training ===


def make_model(num_blocks=2, learning_rate=0.1, compiled=None, **options):
    """Blocks, one of them in a model of its own, and `fit` by mean squared error."""
    defaults = {"num_heads": 2, "intermediate_dim": 7, "num_features": 11, "seed": 5}
    blocks = [
        PerformerEncoderBlock(**{**defaults, **options}, name=f"block_{i}")
        for i in range(num_blocks)
    ]
    inner_input = keras.Input((LENGTH, WIDTH))
    inner = keras.Model(inner_input, blocks[-1](inner_input), name="inner")
    outputs = inputs = keras.Input((LENGTH, WIDTH))
    for block in (*blocks[:-1], inner):
        outputs = block(outputs)
    model = keras.Model(inputs, outputs)
    shorten(model)
    settings = {"optimizer": keras.optimizers.SGD(learning_rate), "loss": "mse"}
    model.compile(**{**settings, **(compiled or {})})
    return model


def shorten(model):
    """Give models with `qk_norm` queries and keys that are short enough for few features."""
    for weight in model.trainable_weights:
        if weight.path.endswith(("query_norm/scale", "key_norm/scale")):
            weight.assign(np.ones(weight.shape))


def make_data(num_batches):
    """`num_batches` batches of one sequence."""
    return normal(num_batches, LENGTH, WIDTH, seed=6), normal(num_batches, LENGTH, WIDTH, seed=7)


def fit(model, num_batches, *callbacks, **options):
    x, y = make_data(num_batches)
    options = {"batch_size": 1, "shuffle": False, "verbose": 0, **options}
    return model.fit(x, y, callbacks=list(callbacks), **options)


def attentions(model):
    return [x for x in model._flatten_layers() if isinstance(x, PerformerAttention)]


def projections(model):
    return [to_numpy(layer.feature_map.projection).copy() for layer in attentions(model)]


def assert_all_exact(actual, expected):
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert_exact(a, e)


@pytest.fixture
def draws(monkeypatch):
    """The (path, seed) of every redraw, in order; every one of them is carried out."""
    seen = []
    redraw = FeatureMap.redraw

    def spy(feature_map, seed):
        seen.append((feature_map.projection.path, seed))
        redraw(feature_map, seed)

    monkeypatch.setattr(FeatureMap, "redraw", spy)
    return seen


def test_features_are_redrawn_after_the_right_batches(draws):
    """No callback but this one: another could put the values of JAX's `fit` back by looking."""
    model = make_model()
    before = projections(model)
    fit(model, 7, RedrawFeatures(every=3))
    assert len(draws) == 4  # two layers after three and after six batches
    assert len(set(draws)) == len({seed for _, seed in draws}) == 4
    after = projections(model)
    for layer, old, new, (_, seed) in zip(attentions(model), before, after, draws[2:], strict=True):
        assert (old != new).any()
        twin = FavorPlus(layer.feature_map.feature_dim, seed=seed)
        twin.build((None, layer.key_dim))
        assert_exact(new, twin.projection)
    assert (after[0] != after[1]).any()


class Losses(keras.callbacks.Callback):
    """The loss of every batch, from its running mean; it does not touch the model."""

    def __init__(self):
        super().__init__()
        self.sums = [0.0]

    def on_train_batch_end(self, batch, logs=None):
        self.sums.append(logs["loss"] * (batch + 1))

    @property
    def losses(self):
        return np.diff(self.sums)


@pytest.mark.parametrize("loss_first", [False, *slow_on_jax(True)])
def test_the_next_batch_sees_the_new_features(draws, loss_first):
    """Weights stand still (learning rate 0), so a loss tells which projection a batch used."""
    model, twin = (make_model(learning_rate=0.0, num_features=2) for _ in range(2))
    twin.set_weights(model.get_weights())
    losses, redraw = Losses(), RedrawFeatures(every=2)
    fit(model, 5, *((losses, redraw) if loss_first else (redraw, losses)))
    x, y = make_data(5)
    seeds, expected, previous = [seed for _, seed in draws], [], []
    for i in range(5):
        batch = {"x": x[i : i + 1], "y": y[i : i + 1], "verbose": 0}
        if i in (2, 4):
            previous.append(twin.evaluate(**batch))
            for layer, seed in zip(attentions(twin), seeds[i - 2 : i], strict=True):
                layer.feature_map.redraw(seed)
        expected.append(twin.evaluate(**batch))
    np.testing.assert_allclose(losses.losses, expected, rtol=1e-4)
    # The features before would have been told from these.
    assert (np.abs(np.divide(previous, [expected[2], expected[4]]) - 1) > 1e-3).all()


def test_training_goes_on_with_the_new_features(draws):
    """`fit` ends with the weights of a loop that redraws by hand between batches."""
    model, twin = make_model(), make_model()
    twin.set_weights(model.get_weights())
    fit(model, 5, RedrawFeatures(every=2))
    x, y = make_data(5)
    seeds = [seed for _, seed in draws]
    for i in range(5):
        twin.train_on_batch(x[i : i + 1], y[i : i + 1])
        if i in (1, 3):
            for layer, seed in zip(attentions(twin), seeds[i - 1 : i + 1], strict=True):
                layer.feature_map.redraw(seed)
    for weight, expected in zip(model.weights, twin.weights, strict=True):
        assert_close(weight, expected, "layer")


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
@SINGLE_STEPS
def test_several_steps_an_execution_redraw_when_a_multiple_is_passed(draws):
    fit(make_model(), 12, RedrawFeatures(every=3))
    single = draws.copy()
    draws.clear()
    grouped = make_model(compiled={"steps_per_execution": 4})
    fit(grouped, 12, RedrawFeatures(every=3))
    # After 4, 8 and 12 batches: the draws of 3, 6 and 12.
    assert [seed for _, seed in draws] == [seed for _, seed in single[:4] + single[6:]]
    draws.clear()
    # Two groups of four and one of two, which Keras counts as four: ten steps.
    fit(make_model(compiled={"steps_per_execution": 4}), 10, RedrawFeatures(every=11))
    assert draws == []


@pytest.mark.slow_on_jax
def test_a_step_is_one_of_the_optimizer(draws):
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = make_model(compiled={"optimizer": optimizer})
    fit(model, 7, RedrawFeatures(every=2))
    assert len(draws) == 2  # after four batches


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_resumed_run_draws_the_same(draws, tmp_path):
    fit(make_model(), 6, RedrawFeatures(every=3, seed=11))
    expected = [seed for _, seed in draws]
    draws.clear()
    model = make_model()
    x, y = make_data(6)
    options = {"batch_size": 1, "shuffle": False, "verbose": 0}
    model.fit(x[:4], y[:4], callbacks=[RedrawFeatures(every=3, seed=11)], **options)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert_all_exact(projections(resumed), projections(model))
    resumed.fit(x[4:], y[4:], callbacks=[RedrawFeatures(every=3, seed=11)], **options)
    assert [seed for _, seed in draws] == expected
    draws.clear()
    fit(model, 1, RedrawFeatures(every=1, seed=12))
    assert not {seed for _, seed in draws} & set(expected)


def test_a_count_restored_at_the_start_of_training_is_seen(draws):
    """`BackupAndRestore` may restore after this callback has begun."""

    class Restore(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.optimizer.iterations.assign(4)

    fit(make_model(), 2, RedrawFeatures(every=3), Restore())
    assert len(draws) == 2  # after six batches, the second of these


@pytest.mark.slow_on_jax
def test_nothing_is_redrawn_outside_of_training(draws):
    model = make_model()
    callback = RedrawFeatures(every=1)
    x, y = make_data(4)
    before = projections(model)
    model.evaluate(x, y, batch_size=1, verbose=0, callbacks=[callback])
    model.predict(x, batch_size=1, verbose=0, callbacks=[callback])
    assert draws == []
    assert_all_exact(projections(model), before)
    fit(model, 2, RedrawFeatures(every=2), validation_data=(x, y))
    assert len(draws) == 2
    # Validation ran with the last draw, as `evaluate` does now.
    history = fit(model, 1, RedrawFeatures(every=3), validation_data=(x, y)).history
    expected = model.evaluate(x, y, batch_size=1, verbose=0)
    np.testing.assert_allclose(history["val_loss"], [expected], rtol=1e-5)


MAPS = [
    FavorPlus(11, trainable_projection=True),
    "elu",
    ReLU(7),
    ReLU(projection=None),
    FavorPlusPlus(11),
    None,
]


def mixed_model(maps):
    outputs = inputs = keras.Input((LENGTH, WIDTH))
    for feature_map in maps:
        outputs = PerformerAttention(2, 4, feature_map=feature_map)(outputs, outputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    return model


@pytest.mark.slow_on_jax
def test_only_random_projections_are_redrawn(draws):
    model = mixed_model(MAPS)
    fit(model, 1, RedrawFeatures(every=1))
    maps = [layer.feature_map for layer in attentions(model)]
    redrawn = [m for m in maps if isinstance(m, ReLU) and m.projection is not None]
    redrawn += [m for m in maps if isinstance(m, FavorPlusPlus)]
    assert [path for path, _ in draws] == [m.projection.path for m in redrawn]
    assert len(draws) == 2


def test_a_model_with_nothing_to_redraw_is_refused():
    model = mixed_model([MAPS[0], MAPS[1], MAPS[3], MAPS[5]])
    with pytest.raises(ValueError, match="found nothing to draw"):
        fit(model, 1, RedrawFeatures(every=1))


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 1.5}, {"every": 1, "seed": -1}])
def test_redraw_refuses_what_cannot_be(arguments):
    with pytest.raises(ValueError, match=f"`{list(arguments)[-1]}` must be an integer"):
        RedrawFeatures(**arguments)


# === AttentionHealth ===


@pytest.mark.slow_on_jax
def test_the_history_holds_the_figures_of_each_layer_and_head():
    model = make_model(num_features=64)
    x = make_data(3)[0]
    callback = AttentionHealth(x)
    logs = fit(model, 2, callback, epochs=2).history
    assert [entry["step"] for entry in callback.history] == [2] * 4 + [4] * 4
    assert [entry["head"] for entry in callback.history] == [0, 1] * 4
    with record_attention() as records:
        model(x)
    paths = [record.layer.path for record in records]
    assert len(set(paths)) == 2
    assert all(path.endswith("self_attention") for path in paths)
    assert [entry["layer"] for entry in callback.history[4:]] == [paths[0]] * 2 + [paths[1]] * 2
    for i, (layer, query, key, *_) in enumerate(records):
        phi = [favor_features(layer.feature_map, to_numpy(t)) for t in (query, key)]
        expected = health_loop(to_numpy(query), to_numpy(key), *phi)
        for head in range(2):
            entry = callback.history[4 + 2 * i + head]
            assert set(entry) == {"step", "layer", "head", *expected}
            for name in expected:
                np.testing.assert_allclose(entry[name], expected[name][head], rtol=1e-3)
    last = callback.history[4:]
    assert logs["attention_relative_variance"][1] == pytest.approx(
        np.median([entry["relative_variance"] for entry in last])
    )
    assert logs["attention_total_variation"][1] == pytest.approx(
        np.mean([entry["total_variation"] for entry in last])
    )


@pytest.mark.slow_on_jax
def test_masks_windows_and_segments_of_the_layer_count():
    layer = PerformerAttention(
        4,
        6,
        num_features=FEATURES,
        qk_norm=True,
        exact_window=2,
        num_sink_tokens=1,
        far_bias=-1.0,
    )
    inputs = [keras.Input((LENGTH, WIDTH))]
    inputs += [keras.Input((LENGTH,), dtype="int32") for _ in range(2)]
    options = {"use_causal_mask": True, "key_mask": inputs[1], "segment_ids": inputs[2]}
    model = keras.Model(inputs, layer(inputs[0], inputs[0], **options))
    shorten(model)
    model.compile("sgd", "mse")
    x = [normal(BATCH, LENGTH, WIDTH), left_padding().astype("int32"), SEGMENTS]
    callback = AttentionHealth(x)
    model.fit(x, x[0], verbose=0, callbacks=[callback])
    with record_attention() as records:
        model(x)
    query, key = to_numpy(records[0].query), to_numpy(records[0].key)
    phi = [favor_features(layer.feature_map, t) for t in (query, key)]
    options = {"exact_window": 2, "num_sink_tokens": 1, "causal": True, "key_mask": x[1]}
    options["far_bias"] = np.full(4, -1.0)
    expected = health_loop(query, key, *phi, segment_ids=SEGMENTS, **options)
    for head, entry in enumerate(callback.history):
        for name in expected:
            np.testing.assert_allclose(entry[name], expected[name][head], rtol=1e-3)


@pytest.mark.slow_on_jax
def test_the_callback_looks_at_as_many_tokens_as_it_is_told_to():
    model = make_model(num_blocks=1, num_features=64)
    x = make_data(2)[0]
    callback = AttentionHealth(x, max_tokens=6)
    fit(model, 1, callback)
    with record_attention() as records:
        model(x)
    _, query, key, *_ = records[0]
    sample = attention_health(query, key, records[0].layer.feature_map, max_tokens=6)
    for head, entry in enumerate(callback.history):
        for name, values in sample.items():
            assert entry[name] == pytest.approx(values[head], rel=1e-4)


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    ("group", "steps"),
    [
        pytest.param(1, [2, 4, 6], marks=pytest.mark.slow_on_jax),
        pytest.param(4, [4, 7], marks=SINGLE_STEPS),
    ],
)
def test_measuring_between_batches_changes_nothing(group, steps):
    settings = {"steps_per_execution": group}
    model, twin = (make_model(num_features=64, compiled=settings) for _ in range(2))
    twin.set_weights(model.get_weights())
    callback = AttentionHealth(make_data(2)[0], every=2)
    logs = fit(model, 7, callback).history
    fit(twin, 7)
    assert sorted({entry["step"] for entry in callback.history}) == steps
    for weight, expected in zip(model.weights, twin.weights, strict=True):
        assert_close(weight, expected, "layer")
    last = [e["total_variation"] for e in callback.history if e["step"] == steps[-1]]
    assert logs["attention_total_variation"] == [pytest.approx(np.mean(last))]


def test_it_measures_what_was_redrawn():
    model = make_model(num_blocks=1, num_features=64, learning_rate=0.0)
    callback = AttentionHealth(make_data(2)[0], every=1)
    fit(model, 3, RedrawFeatures(every=2), callback)
    measured = [e["measured_relative_variance"] for e in callback.history if e["head"] == 0]
    assert measured[0] != pytest.approx(measured[1], rel=1e-3)
    assert measured[1] == pytest.approx(measured[2], rel=1e-5)


def test_a_head_beyond_its_features_is_warned_of_once_a_training():
    model = make_model(qk_norm=False, learning_rate=0.0)
    layer = attentions(model)[1]
    kernel = to_numpy(layer.query_dense.kernel).copy()
    kernel[:, 1] *= 20
    layer.query_dense.kernel.assign(kernel)
    callback = AttentionHealth(make_data(2)[0])
    for _ in range(2):
        with pytest.warns(UserWarning, match="is beyond its features") as caught:
            fit(model, 1, callback, epochs=2)
        messages = [str(w.message) for w in caught if "beyond its features" in str(w.message)]
        assert len(messages) == 1
        assert messages[0].startswith(f"Head 1 of {layer.path} is")
        for remedy in ("num_features", "qk_norm=True", "exact_window", "FavorPlusPlus"):
            assert remedy in messages[0]
        worst = max(callback.history, key=lambda entry: entry["relative_variance"])
        assert (worst["layer"], worst["head"]) == (layer.path, 1)
        assert worst["relative_variance"] > 1
        assert len(callback.history) == 8


def test_healthy_heads_bring_no_warning():
    model = make_model(num_features=64)
    callback = AttentionHealth(make_data(2)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model, 1, callback)
    assert max(entry["relative_variance"] for entry in callback.history) < 1


@pytest.mark.slow_on_jax
def test_other_maps_and_exact_layers():
    model = mixed_model(["relu", None, FavorPlus(64)])
    callback = AttentionHealth(0.1 * make_data(2)[0])
    logs = fit(model, 1, callback).history
    relu, favor = callback.history[:2], callback.history[2:]
    common = {"step", "layer", "head", "total_variation", "effective_features"}
    assert [set(entry) for entry in relu] == [common] * 2
    assert len(favor) == 2
    variances = [entry["relative_variance"] for entry in favor]
    assert logs["attention_relative_variance"] == [pytest.approx(np.median(variances))]
    only_relu = fit(mixed_model(["relu"]), 1, AttentionHealth(make_data(2)[0])).history
    assert "attention_total_variation" in only_relu
    assert "attention_relative_variance" not in only_relu


def test_a_model_without_feature_attention_is_refused():
    with pytest.raises(ValueError, match="found nothing to measure"):
        fit(mixed_model([None]), 1, AttentionHealth(make_data(2)[0]))


@pytest.mark.parametrize(
    "arguments", [{"every": "batch"}, {"every": 0}, {"max_tokens": 0}, {"max_tokens": None}]
)
def test_health_refuses_what_cannot_be(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be"):
        AttentionHealth(make_data(2)[0], **arguments)


@pytest.mark.slow_on_jax
def test_every_attention_of_a_model_is_measured():
    """Reversible streams, remat, cross-attention and masks, without gradients or tracing."""
    sizes = {"vocabulary_size": 30, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 17}
    ids = np.random.default_rng(0).integers(1, 30, size=(2, 7)).astype("int32")
    mask = (np.arange(7) < np.array([[4], [7]])).astype("int32")
    decoder = PerformerDecoderBackbone(**sizes, num_layers=1, num_features=13, reversible=True)
    seq_2_seq = PerformerSeq2SeqBackbone(**sizes, num_layers=1, num_features=13, remat=True)
    source = {"encoder_token_ids": ids[:, :5], "encoder_padding_mask": mask[:, :5]}
    target = {"decoder_token_ids": ids, "decoder_padding_mask": mask}
    for model, inputs, expected in (
        (decoder, {"token_ids": ids, "padding_mask": mask}, [True]),
        (seq_2_seq, {**source, **target}, [False, True, False]),
    ):
        with record_attention() as records:
            model(inputs, training=False)
        assert [record.causal for record in records] == expected
        for layer, query, key, key_mask, causal, segment_ids in records:
            options = {"causal": causal, "key_mask": key_mask, "segment_ids": segment_ids}
            figures = attention_health(query, key, layer.feature_map, **options)
            assert figures["total_variation"].shape == (3,)
            assert all(np.isfinite(values).all() for values in figures.values())


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    scalars = {}
    for path in sorted(folder.iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.tensor.float_val[0]
    return scalars


def test_scalars_for_tensorboard(tmp_path):
    folder = tmp_path / "new" / "logs"
    model = make_model(num_features=64)
    callback = AttentionHealth(make_data(2)[0], log_dir=str(folder))
    fit(model, 2, callback, epochs=2)
    scalars = read_scalars(folder)
    names = set(callback.history[0]) - {"step", "layer", "head"}
    assert len(names) == 5
    assert len(scalars) == len(names) * len(callback.history)
    for entry in callback.history:
        for name in names:
            tag = f"attention/{entry['layer']}/head_{entry['head']}/{name}"
            assert scalars[tag, entry["step"]] == pytest.approx(entry[name])
    fit(model, 1, callback)
    assert len(list(folder.iterdir())) == 2
    assert len(read_scalars(folder)) == len(scalars) + len(names) * 4


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow is the backend")
def test_writing_scalars_leaves_tensorflow_out(tmp_path):
    script = (
        "import sys\n"
        "from keras_performer.callbacks._scalar_writer import ScalarWriter\n"
        f"writer = ScalarWriter({str(tmp_path)!r})\n"
        "writer.write({'a': 1.0}, 2)\n"
        "writer.close()\n"
        "sys.exit('tensorflow' in sys.modules)"
    )
    run_code(script)
    assert read_scalars(tmp_path) == {("a", 2): 1.0}


def test_a_training_that_failed_leaves_no_file_open(tmp_path):
    model, data = make_model(), make_data(2)
    health = AttentionHealth(data[0], log_dir=str(tmp_path))
    health.set_model(model)
    health.on_train_begin()
    first = health._writer
    health.on_train_begin()  # without an end between
    assert health._writer is not first and first._records.closed
    health.on_train_end()


def test_a_folder_for_scalars_needs_tensorboard(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name)
    )
    with pytest.raises(ImportError, match=r"pip install 'keras-performer\[train\]'"):
        AttentionHealth(make_data(2)[0], log_dir="logs")
    AttentionHealth(make_data(2)[0])


class Subclassed(keras.Model):
    """Its layers have no weights before the first batch."""

    def __init__(self, **options):
        super().__init__()
        self.attention = PerformerAttention(2, 4, **options)

    def call(self, x):
        return self.attention(x, x)


@pytest.mark.filterwarnings("ignore:Head .* is beyond its features")
def test_models_that_fit_builds_are_drawn_and_measured():
    x = normal(4, 5, 6)
    model = Subclassed(num_features=8)
    model.compile("sgd", "mse")
    health, redraw = AttentionHealth(x[:2]), RedrawFeatures(every=1)
    model.fit(x, x, batch_size=2, epochs=1, verbose=0, callbacks=[redraw, health])
    assert len(health.history) == 2
    for callback, message in ((redraw, "nothing to draw"), (health, "nothing to measure")):
        other = Subclassed(feature_map=None)
        other.compile("sgd", "mse")
        with pytest.raises(ValueError, match=message):
            other.fit(x, x, batch_size=2, verbose=0, callbacks=[callback])


def test_a_kernel_of_ones_own_can_be_built_within_a_training_step():
    x = normal(4, 5, 6)
    model = Subclassed(feature_map=GeneralizedKernel(squared))
    model.compile("sgd", "mse")
    assert np.isfinite(model.fit(x, x, batch_size=2, verbose=0).history["loss"]).all()


def test_a_loop_of_ones_own_need_only_tell_of_its_batches(draws):
    model = make_model(num_blocks=1)
    callback = RedrawFeatures(every=2)
    callback.set_model(model)
    counts = []
    for step in range(1, 7):
        model.optimizer.iterations.assign(step)
        callback.on_train_batch_end(step - 1)
        counts.append(len(draws))
    assert counts == [0, 1, 1, 2, 2, 3]


def test_a_model_without_an_optimizer_is_told_of():
    x = keras.Input((None, WIDTH))
    callback = RedrawFeatures(every=2)
    callback.set_model(keras.Model(x, x))
    with pytest.raises(ValueError, match="compile the model"):
        callback.on_epoch_begin(0)
