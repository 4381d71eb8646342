"""The contract and the laws of `favor_attention`, for every implementation."""

import itertools

import keras
import numpy as np
import oracles
import pytest
from gradients import attend, attention_gradients, gradients, implementations
from keras import ops
from marks import slow_on_jax
from samples import make_segments
from tolerances import (
    assert_close,
    assert_gradients_close,
    assert_states_close,
    relative_rms,
    to_numpy,
)

from keras_performer.feature_maps import ELU, FavorPlus, GeneralizedKernel, ReLU
from keras_performer.ops import (
    _chunked,
    _sums,
    empty_favor_state,
    favor_attention,
    favor_attention_weights,
    softmax_attention,
)
from keras_performer.ops._chunked import CHUNK
from keras_performer.ops._scan import scan

BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM, FEATURES = 2, 6, 3, 8, 5, 24
# A mask of all keys is one of the masks: where time is short the masked cases stand for both.
UNMASKED = pytest.param(False, marks=pytest.mark.slow_on_jax)
# Those without an exact near field, which has tests of its own.
PLAIN = sorted(implementations())
FAST = sorted(set(PLAIN) - {"reference"})
LENGTHS = (
    1,
    pytest.param(CHUNK - 1, marks=pytest.mark.slow_on_jax),
    pytest.param(CHUNK, marks=pytest.mark.slow_on_jax),
    CHUNK + 1,
    2 * CHUNK + 41,
)


pytestmark = pytest.mark.usefixtures("short_steps")


def feature_map(seed=1, **kwargs):
    return FavorPlus(FEATURES, seed=seed, **kwargs)


def make_qkv(length, key_length=None, *, seed=0, scale=1.0, key_heads=KEY_HEADS, batch=BATCH):
    rng = np.random.default_rng(seed)
    key_length = key_length or length
    query = scale * rng.standard_normal((batch, length, HEADS, HEAD_DIM))
    key = scale * rng.standard_normal((batch, key_length, key_heads, HEAD_DIM))
    value = rng.standard_normal((batch, key_length, key_heads, VALUE_DIM))
    return tuple(x.astype("float32") for x in (query, key, value))


def make_mask(length, seed=2):
    mask = np.random.default_rng(seed).random((BATCH, length)) > 0.3
    mask[:, 0] = True
    return mask


def make_options(length, masked, segmented):
    options = {}
    if masked:
        options["key_mask"] = make_mask(length)
    if segmented:
        options["segment_ids"] = make_segments(length)
    return options


def make_direction(length):
    direction = np.random.default_rng(5).standard_normal((BATCH, length, HEADS, VALUE_DIM))
    return direction.astype("float32")


def log_features(x, fm):
    return oracles.favor_log_features(
        x, to_numpy(fm.projection), hyperbolic=getattr(fm, "hyperbolic", False)
    )


def oracle(query, key, value, fm, **options):
    """The float64 loop, with key heads repeated for the query heads they serve."""
    groups = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, groups, axis=2) for x in (key, value))
    if not fm.built:
        fm.build(key.shape)
    return oracles.kernel_attention_loop(
        log_features(query, fm), log_features(key, fm), value.astype("float64"), **options
    )


# The definition against an independent float64 loop.


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_equals_a_float64_loop_over_pairs(implementation, causal, masked, segmented):
    length = 13
    query, key, value = make_qkv(length)
    options = {"causal": causal, **make_options(length, masked, segmented)}
    fm = feature_map()
    output = attend(query, key, value, fm, implementation=implementation, **options)
    assert_close(output, oracle(query, key, value, fm, **options))


@pytest.mark.parametrize("implementation", PLAIN)
def test_cross_attention_equals_a_float64_loop(implementation):
    query, key, value = make_qkv(11, 17)
    fm = feature_map(hyperbolic=True)
    output = attend(query, key, value, fm, implementation=implementation)
    assert_close(output, oracle(query, key, value, fm))


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "fm",
    [ReLU(FEATURES, seed=3), ReLU(projection=None, kernel_epsilon=0.0), ELU()],
    ids=["relu", "relu without epsilon", "elu"],
)
def test_plain_features_equal_a_float64_loop(implementation, causal, fm):
    query, key, value = make_qkv(13, key_heads=HEADS)
    phi_q, phi_k = (to_numpy(fm(x)).astype("float64") for x in (query, key))
    expected = oracles.plain_attention_loop(phi_q, phi_k, value, causal=causal)
    output = attend(query, key, value, fm, causal=causal, implementation=implementation)
    assert_close(output, expected)


# Every implementation against the reference: outputs, states, gradients.


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [UNMASKED, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_reference(implementation, causal, masked, segmented, length):
    query, key, value = make_qkv(length)
    options = {"causal": causal, **make_options(length, masked, segmented)}
    fm = feature_map()
    if causal or not segmented:
        options["return_state"] = True
    expected = attend(query, key, value, fm, implementation="reference", **options)
    actual = attend(query, key, value, fm, implementation=implementation, **options)
    if "return_state" in options:
        assert_states_close(actual[1], expected[1])
        expected, actual = expected[0], actual[0]
    assert_close(actual, expected)


@pytest.mark.parametrize("make", [feature_map, lambda: ReLU(FEATURES, seed=1)])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("rows", [*slow_on_jax(1), 2**20])
def test_large_batches_take_shorter_steps(monkeypatch, make, segmented, rows):
    """One chunk a step, or all of them in one: the outputs and gradients are the same."""
    monkeypatch.setattr(_sums, "_MOST_CHUNKS", 16)
    monkeypatch.setattr(_sums, "_STEP_NUMBERS", rows)
    length = 2 * CHUNK + 9
    arrays, fm, direction = make_qkv(length), make(), make_direction(length)
    options = {"causal": True, **make_options(length, True, segmented)}
    steps = []
    monkeypatch.setattr(_chunked, "scan", lambda *a, **k: steps.append(a[2]) or scan(*a, **k))
    actual = attention_gradients(*arrays, fm, direction, implementation="chunked", **options)
    assert {xs[0].shape[0] for xs in steps} == {3 if rows == 1 else 1}
    expected = attention_gradients(*arrays, fm, direction, implementation="reference", **options)
    assert_close(actual[0], expected[0])
    assert_gradients_close(actual[1], expected[1])


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [UNMASKED, True])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [1, 2 * CHUNK + 1])
def test_gradients_equal_the_reference(implementation, causal, masked, segmented, length):
    arrays, fm = make_qkv(length), feature_map()
    options = {"causal": causal, **make_options(length, masked, segmented)}
    direction = make_direction(length)
    _, expected = attention_gradients(*arrays, fm, direction, implementation="reference", **options)
    _, actual = attention_gradients(
        *arrays, fm, direction, implementation=implementation, **options
    )
    assert_gradients_close(actual, expected)
    assert all(np.abs(g).max() > 1e-3 for g in (actual[2],))
    if length > 1:
        assert all(np.abs(g).max() > 1e-3 for g in actual)


class LearnedMap(FavorPlus):
    """A map whose projection is an argument, to differentiate by it."""

    def __init__(self, projection, **kwargs):
        super().__init__(**kwargs)
        self.given = projection

    def operands(self, key, key_mask):
        return (self.given,)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_by_feature_weights_and_state_equal_the_reference(
    implementation, causal, segmented
):
    if segmented and not causal:
        pytest.skip("bidirectional attention within segments has no state")
    length = 2 * CHUNK + 3
    query, key, value = make_qkv(length)
    projection = np.random.default_rng(7).standard_normal((FEATURES, HEAD_DIM)).astype("float32")
    rng = np.random.default_rng(8)
    direction = rng.standard_normal((BATCH, length, HEADS, VALUE_DIM)).astype("float32")
    kv = rng.standard_normal((BATCH, KEY_HEADS, FEATURES, VALUE_DIM)).astype("float32")
    k_sum = rng.random((BATCH, KEY_HEADS, FEATURES)).astype("float32") + 0.5
    log_max = rng.standard_normal((BATCH, KEY_HEADS, FEATURES)).astype("float32")
    segments = make_segments(length)

    def loss(implementation):
        def fn(query, key, value, projection, kv, k_sum):
            fm = LearnedMap(projection, num_features=FEATURES, seed=1)
            state = {"kv": kv, "k_sum": k_sum, "log_max": log_max}
            options = {}
            if segmented:
                options["segment_ids"] = segments
                state["segment_id"] = segments[:, 0]
            output, last = favor_attention(
                query,
                key,
                value,
                fm,
                causal=causal,
                initial_state=state,
                return_state=True,
                implementation=implementation,
                **options,
            )
            # The sums that the state stands for, each feature relative to a fixed scale.
            factor = ops.exp(ops.stop_gradient(last["log_max"]) - 4.0)
            sums = ops.expand_dims(factor, -1) * last["kv"]
            return (
                ops.sum(ops.multiply(output, direction))
                + 0.01 * ops.sum(ops.square(sums))
                + 0.01 * ops.sum(factor * last["k_sum"])
            )

        return fn

    arrays = (query, key, value, projection, kv, k_sum)
    expected_value, expected = gradients(loss("reference"), *arrays)
    actual_value, actual = gradients(loss(implementation), *arrays)
    # The value is a sum of thousands of terms of order one that nearly cancel.
    np.testing.assert_allclose(actual_value, expected_value, rtol=1e-5, atol=1e-4)
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(e).max() > 1e-3
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-5 * np.abs(e).max())


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_equals_a_difference_quotient(implementation, causal):
    arrays = make_qkv(5, batch=1)
    fm = feature_map()
    fm.build(arrays[1].shape)
    rng = np.random.default_rng(3)
    direction = rng.standard_normal((1, 5, HEADS, VALUE_DIM))
    steps = [rng.standard_normal(x.shape) for x in arrays]

    def fn(query, key, value):
        out = favor_attention(query, key, value, fm, causal=causal, implementation=implementation)
        return ops.sum(ops.multiply(out, direction.astype("float32")))

    def truth(epsilon):
        moved = [x.astype("float64") + epsilon * s for x, s in zip(arrays, steps, strict=True)]
        return np.sum(oracle(*moved, fm, causal=causal) * direction)

    _, grads = gradients(fn, *arrays)
    expected = (truth(1e-4) - truth(-1e-4)) / 2e-4
    slope = sum(np.sum(g * s) for g, s in zip(grads, steps, strict=True))
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("causal", [False, True])
def test_other_float_types(dtype, causal):
    query, key, value = make_qkv(CHUNK + 5)
    fm = feature_map()
    expected = attend(query, key, value, fm, causal=causal)
    cast = [ops.cast(ops.convert_to_tensor(x), dtype) for x in (query, key, value)]
    actual = attend(*cast, fm, causal=causal)
    assert actual.dtype == cast[0].dtype
    assert_close(ops.cast(actual, "float32"), expected, "float32" if dtype == "float64" else dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_a_state_of_float64_is_of_float64(causal):
    tensors = [ops.cast(ops.convert_to_tensor(x), "float64") for x in make_qkv(9)]
    for options in ({}, {"exact_window": 2}):
        options |= {"causal": causal, "return_state": True}
        _, state = favor_attention(*tensors, feature_map(), **options)
        for name in ("kv", "k_sum", "log_max"):
            assert state[name].dtype == tensors[0].dtype, (name, options)


# Laws.


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("key_scale", [1.0, 8.0])
@pytest.mark.parametrize("place", [0, 40, 47, 48, 70, 95, 96, 150])
def test_the_future_does_not_matter(implementation, key_scale, place):
    """Guards against scales and maxima taken over keys that come later."""
    length = 2 * CHUNK + 37  # two steps of two chunks of 48 tokens
    query, key, value = make_qkv(length)
    later = make_qkv(length, seed=9)
    changed = [x.copy() for x in (query, key, value)]
    for new, other, scale in zip(changed, later, (1.0, key_scale, 100.0), strict=True):
        new[:, place + 1 :] = scale * other[:, place + 1 :]
    fm = feature_map()
    options = {"causal": True, "implementation": implementation}
    before = to_numpy(attend(query, key, value, fm, **options))[:, : place + 1]
    after = to_numpy(attend(*changed, fm, **options))[:, : place + 1]
    assert relative_rms(after, before) < 1e-5
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("scale", [0.01, *slow_on_jax(0.1), 1.0, *slow_on_jax(3.0), 8.0])
def test_the_first_causal_output_is_the_first_value(implementation, scale):
    for seed in range(8):
        query, key, value = make_qkv(23, seed=seed, scale=scale)
        output = attend(
            query, key, value, feature_map(), causal=True, implementation=implementation
        )
        assert_close(output[:, 0], np.repeat(value[:, 0], HEADS // KEY_HEADS, axis=1))


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_first_causal_output_is_the_first_value_when_key_and_query_are_parallel(direction):
    query, _, value = make_qkv(23, scale=8.0, key_heads=HEADS)
    key = direction * query
    output = attend(query, key, value, feature_map(), causal=True)
    assert_close(output[:, 0], value[:, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loud", ["first", "all but the first"])
def test_mixed_norms_in_one_chunk_equal_a_float64_loop(causal, loud):
    """Guards against one scale for a chunk, under which quiet rows underflow."""
    query, key, value = make_qkv(13)
    part = slice(0, 1) if loud == "first" else slice(1, None)
    query[:, part] *= 8
    key[:, part] *= 8
    fm = feature_map()
    output = attend(query, key, value, fm, causal=causal)
    expected = oracle(query, key, value, fm, causal=causal)
    # Scores of hundreds round to 1e-5 in float32, whichever way they are formed.
    assert relative_rms(output, expected) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scale", [100.0, 1000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_norms_give_finite_averages(dtype, scale, causal):
    query, key, value = make_qkv(CHUNK + 9, scale=scale)
    fm = feature_map()

    def fn(query, key, value):
        cast = [ops.cast(x, dtype) for x in (query, key, value)]
        return ops.sum(ops.square(ops.cast(favor_attention(*cast, fm, causal=causal), "float32")))

    output = to_numpy(
        attend(
            *(ops.cast(ops.convert_to_tensor(x), dtype) for x in (query, key, value)),
            fm,
            causal=causal,
        )
    )
    assert np.isfinite(output).all()
    assert np.abs(output).max() <= np.abs(value).max() * 1.01
    assert np.abs(output).max() > 0.1
    _, grads = gradients(fn, query, key, value)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fm", [feature_map(), ELU()], ids=["favor_plus", "elu"])
def test_padding_does_not_matter(implementation, causal, fm):
    """Guards against masking values but not keys, and against padding that sets a maximum."""
    length, padding = 21, CHUNK
    query, key, value = make_qkv(length)
    expected = attend(query, key, value, fm, causal=causal, implementation=implementation)
    for filler in (0.0, 30.0, np.nan):
        for left in (False, True):
            sides = (padding, 0) if left else (0, padding)
            width = [(0, 0), sides, (0, 0), (0, 0)]
            padded = [np.pad(x, width, constant_values=filler) for x in (key, value)]
            padded_query = np.pad(query, width, constant_values=0.0 if filler != filler else filler)
            mask = np.pad(np.ones((BATCH, length), bool), width[:2])
            output = to_numpy(
                attend(
                    padded_query,
                    *padded,
                    fm,
                    causal=causal,
                    key_mask=mask,
                    implementation=implementation,
                )
            )
            assert_close(output[:, padding:] if left else output[:, :length], expected)


def test_no_gradient_reaches_padding():
    query, key, value = make_qkv(CHUNK + 7)
    mask = make_mask(CHUNK + 7)
    key[~mask] = np.nan

    def fn(query, key, value):
        return ops.sum(favor_attention(query, key, value, feature_map(), key_mask=mask) ** 2)

    _, (_, d_key, d_value) = gradients(fn, query, key, value)
    assert (d_key[~mask] == 0).all() and (d_value[~mask] == 0).all()
    assert (np.abs(d_value[mask]).sum(axis=-1) > 0).all()


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fm", [feature_map(), ELU()], ids=["favor_plus", "elu"])
def test_a_query_that_sees_no_key_gives_zeros(implementation, causal, fm):
    query, key, value = make_qkv(CHUNK + 7)
    mask = np.ones((BATCH, CHUNK + 7), bool)
    mask[0] = False
    mask[1, :5] = False
    output = to_numpy(
        attend(query, key, value, fm, causal=causal, key_mask=mask, implementation=implementation)
    )
    assert (output[0] == 0).all()
    assert (output[1, :5] == 0).all() == causal
    assert (np.abs(output[1, 5:]).sum(axis=-1) > 0).all()


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_a_constant_value_comes_back(implementation, causal, segmented):
    length = CHUNK + 5
    query, key, value = make_qkv(length)
    value[:] = 3.5
    options = {"segment_ids": make_segments(length)} if segmented else {}
    output = attend(
        query, key, value, feature_map(), causal=causal, implementation=implementation, **options
    )
    assert_close(output, np.full((BATCH, length, HEADS, VALUE_DIM), 3.5))


@pytest.mark.parametrize("implementation", PLAIN)
def test_the_order_of_keys_does_not_matter(implementation):
    query, key, value = make_qkv(7, 2 * CHUNK + 3)
    order = np.random.default_rng(4).permutation(key.shape[1])
    fm = feature_map()
    expected = attend(query, key, value, fm, implementation=implementation)
    shuffled = attend(query, key[:, order], value[:, order], fm, implementation=implementation)
    assert_close(shuffled, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_segments_equal_separate_calls(causal):
    length = 2 * CHUNK + 19
    query, key, value = make_qkv(length)
    segments = np.zeros((BATCH, length), "int32")
    bounds = [0, 3, 90, CHUNK + 40, length]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        segments[:, start:stop] = i % 2
    fm = feature_map()
    output = to_numpy(attend(query, key, value, fm, causal=causal, segment_ids=segments))
    for start, stop in itertools.pairwise(bounds):
        alone = attend(
            query[:, start:stop], key[:, start:stop], value[:, start:stop], fm, causal=causal
        )
        assert_close(output[:, start:stop], alone)


# State.


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    "splits", [(1,), *slow_on_jax((CHUNK,)), (5, 6, CHUNK + 9), tuple(range(1, 12))]
)
def test_split_and_resume_equals_one_call(implementation, segmented, splits):
    length = 2 * CHUNK + 31
    query, key, value = make_qkv(length)
    mask = make_mask(length)
    segments = make_segments(length)
    fm = feature_map()
    common = {"causal": True, "implementation": implementation, "return_state": True}
    options = {"key_mask": mask}
    if segmented:
        options["segment_ids"] = segments
    expected, last = attend(query, key, value, fm, **common, **options)
    state, outputs = None, []
    for start, stop in itertools.pairwise((0, *splits, length)):
        part = {name: array[:, start:stop] for name, array in options.items()}
        output, state = attend(
            *(x[:, start:stop] for x in (query, key, value)),
            fm,
            initial_state=state,
            **common,
            **part,
        )
        outputs.append(to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), expected)
    assert_states_close(state, last)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_decoding_token_by_token_equals_one_call(implementation, scale):
    length = 37
    query, key, value = make_qkv(length, scale=scale)
    fm = feature_map()
    common = {"causal": True, "implementation": implementation}
    expected = attend(query, key, value, fm, **common)
    state, outputs = None, []
    for t in range(length):
        output, state = attend(
            *(x[:, t : t + 1] for x in (query, key, value)),
            fm,
            initial_state=state,
            return_state=True,
            **common,
        )
        outputs.append(to_numpy(output))
    # Features at eight times the usual norm are exponentials of hundreds: 1e-5 of those is 1e-3.
    tolerance = 1e-5 if scale == 1.0 else 1e-3
    assert relative_rms(np.concatenate(outputs, axis=1), expected) < tolerance


@pytest.mark.parametrize("implementation", PLAIN)
def test_bidirectional_keys_may_be_split_before_the_query(implementation):
    query, key, value = make_qkv(11, CHUNK + 31)
    fm = feature_map()
    common = {"implementation": implementation}
    expected = attend(query, key, value, fm, **common)
    _, state = attend(query, key[:, :50], value[:, :50], fm, return_state=True, **common)
    output = attend(query, key[:, 50:], value[:, 50:], fm, initial_state=state, **common)
    assert_close(output, expected)


@pytest.mark.parametrize("fm", [feature_map(), ReLU(FEATURES, seed=1)], ids=["log", "plain"])
@pytest.mark.parametrize("causal", [False, True])
def test_states_are_interchangeable_between_implementations(causal, fm):
    query, key, value = make_qkv(29)
    expected = attend(query, key, value, fm, causal=causal)
    for first, second in itertools.permutations(PLAIN, 2):
        head = [x[:, :17] for x in (query, key, value)]
        tail = [x[:, 17:] for x in (query, key, value)]
        _, state = attend(*head, fm, causal=causal, return_state=True, implementation=first)
        output = attend(*tail, fm, causal=causal, initial_state=state, implementation=second)
        assert_close(output, expected[:, 17:])


def test_the_state_has_a_fixed_size_with_the_batch_first():
    sizes = set()
    for length in (1, 300):
        _, state = attend(
            *make_qkv(length),
            feature_map(),
            causal=True,
            segment_ids=make_segments(length),
            return_state=True,
        )
        sizes.add(tuple((name, tuple(state[name].shape)) for name in sorted(state)))
    assert sizes == {
        (
            ("k_sum", (BATCH, KEY_HEADS, FEATURES)),
            ("kv", (BATCH, KEY_HEADS, FEATURES, VALUE_DIM)),
            ("log_max", (BATCH, KEY_HEADS, FEATURES)),
            ("segment_id", (BATCH,)),
        )
    }


# Weights to look at.


@pytest.mark.parametrize("causal", [False, True])
def test_weights_reproduce_the_output(causal):
    query, key, value = make_qkv(19)
    mask, fm = make_mask(19), feature_map()
    weights = to_numpy(favor_attention_weights(query, key, fm, causal=causal, key_mask=mask))
    assert weights.shape == (BATCH, HEADS, 19, 19)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
    assert (weights[~np.broadcast_to(mask[:, None, None], weights.shape)] == 0).all()
    if causal:
        assert (np.triu(weights, 1) == 0).all()
    output = attend(query, key, value, fm, causal=causal, key_mask=mask)
    repeated = np.repeat(value, HEADS // KEY_HEADS, axis=2)
    assert_close(np.einsum("bnts,bsnv->btnv", weights, repeated), output)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "query must have four axes"),
        (lambda q, k, v: (q, k[..., :7], v), "same head size"),
        (lambda q, k, v: (q, k[:, :5], v), "same length"),
        (lambda q, k, v: (q[:1], k, v), "one batch size"),
        (lambda q, k, v: (q[:, :, :5], k, v), "multiple of the key heads"),
        (lambda q, k, v: (q, k[:, :, :1], v), "same number of heads"),
        (lambda q, k, v: (q[:, :0], k, v), "empty axis"),
    ],
)
def test_bad_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as info:
        favor_attention(*change(*make_qkv(9)), feature_map())
    assert "Received: query.shape=" in str(info.value)


def test_bad_arguments_are_refused():
    query, key, value = make_qkv(9)
    fm, ids = feature_map(), np.zeros((BATCH, 9), "int32")
    with pytest.raises(TypeError, match=r"feature_map must be a .*Received: feature_map=None"):
        favor_attention_weights(query, key, None)
    for options in ({"exact_window": True}, {"exact_window": 2, "num_sink_tokens": None}):
        with pytest.raises(ValueError, match="must be an integer of at least 0"):
            favor_attention(query, key, value, fm, **options)
    with pytest.raises(TypeError, match=r"segment_ids must be integers.*type float32"):
        favor_attention(query, key, value, fm, segment_ids=np.zeros((BATCH, 9), "float32"))
    with pytest.raises(TypeError, match="floating point"):
        favor_attention(query.astype("int32"), key, value, fm)
    with pytest.raises(TypeError, match="feature_map must be a"):
        favor_attention(query, key, value, "favor_plus")
    with pytest.raises(ValueError, match="implementation must be 'auto' or one of"):
        favor_attention(query, key, value, fm, implementation="fast")
    with pytest.raises(ValueError, match="causal=True needs queries and keys"):
        favor_attention(query, key[:, :5], value[:, :5], fm, causal=True)
    with pytest.raises(ValueError, match="segment_ids needs queries and keys"):
        favor_attention(query, key[:, :5], value[:, :5], fm, segment_ids=ids)
    for mask in (np.ones((9, 9)), np.ones((BATCH, 9, 9)), np.ones((BATCH, 1, 1, 9))):
        with pytest.raises(ValueError, match="cannot be honoured in linear time"):
            favor_attention(query, key, value, fm, key_mask=mask)
    with pytest.raises(ValueError, match="has no single state"):
        favor_attention(query, key, value, fm, segment_ids=ids, return_state=True)
    with pytest.raises(ValueError, match="initial_state must be a state"):
        favor_attention(query, key, value, fm, initial_state={"kv": 1})
    _, state = favor_attention(query, key, value, fm, return_state=True)
    with pytest.raises(ValueError, match=r"initial_state\['kv'\] must have the shape"):
        favor_attention(query, key, value, FavorPlus(16), initial_state=state)
    with pytest.raises(ValueError, match="built for head size 8"):
        favor_attention(query[..., :5], key[..., :5], value, fm)
    with pytest.raises(ValueError, match="must say which segment"):
        favor_attention(
            query,
            key,
            value,
            fm,
            causal=True,
            segment_ids=ids,
            initial_state=state,
        )


def test_a_user_kernel_works_end_to_end():
    query, key, value = make_qkv(CHUNK + 3, key_heads=HEADS)
    fm = GeneralizedKernel(lambda x: x * x, kernel_epsilon=0.01)
    phi_q, phi_k = (x.astype("float64") ** 2 + 0.01 for x in (query[:, :9], key[:, :9]))
    expected = oracles.plain_attention_loop(phi_q, phi_k, value[:, :9], causal=True)
    output = favor_attention(query, key, value, fm, causal=True)
    assert_close(output[:, :9], expected)


needs_torch = pytest.mark.skipif(
    keras.config.backend() != "torch", reason="it concerns PyTorch's autograd"
)


@needs_torch
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [5, 1100])
def test_a_gradient_has_a_gradient(length, causal):
    import torch

    torch.manual_seed(1)
    x = torch.randn(1, length, 1, 4, requires_grad=True)
    direction = torch.randn(1, length, 1, 4)
    fm = FavorPlus(6, seed=1)

    def second(implementation):
        y = favor_attention(x, x, x, fm, causal=causal, implementation=implementation)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), x)[0]

    assert_gradients_close([second("auto")], [second("reference")])


@needs_torch
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_autocast_does_not_reach_the_sums(dtype, window):
    import torch

    x = 0.05 * torch.randn(1, 4000, 1, 8)
    value = 20 + torch.randn(1, 4000, 1, 8)
    fm = FavorPlus(8, seed=0)
    expected = favor_attention(x, x, value, fm, exact_window=window)
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        output = favor_attention(x, x, value, fm, exact_window=window)
        banded = softmax_attention(x, x, value, sliding_window=4)
    assert_close(output, expected)
    assert_close(banded, softmax_attention(x, x, value, sliding_window=4))


def test_sinks_in_a_state_are_not_forgotten():
    query, key, value = make_qkv(7)
    fm = feature_map()
    options = {"causal": True, "exact_window": 2}
    _, state = attend(query, key, value, fm, num_sink_tokens=1, return_state=True, **options)
    with pytest.raises(ValueError, match="comes from a call with num_sink_tokens"):
        attend(query, key, value, fm, initial_state=state, **options)


@pytest.mark.skipif(keras.config.backend() != "jax", reason="it concerns JAX's traces")
def test_a_map_built_in_a_trace_outlives_it():
    import jax

    fm = FavorPlus(6, seed=1)
    query, key, value = make_qkv(5)
    jitted = jax.jit(lambda *tensors: favor_attention(*tensors, fm))
    output = jitted(query, key, value)
    assert_close(output, attend(query, key, value, fm))
    assert np.isfinite(to_numpy(jitted(query[:, :4], key, value))).all()


@pytest.mark.parametrize("window", [None, 2])
def test_padding_behind_a_call_does_not_end_its_segment(window):
    """Packed data pad with an id of their own, mostly 0."""
    query, key, value = make_qkv(7)
    fm = feature_map()
    options = {"causal": True, "exact_window": window}
    ids = np.array([[1] * 7, [1, 1, 1, 2, 2, 2, 2]], "int32")
    expected = attend(query, key, value, fm, segment_ids=ids, **options)
    state, outputs = None, []
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        part = [
            np.pad(x[:, start:stop], ((0, 0), (0, 2), (0, 0), (0, 0))) for x in (query, key, value)
        ]
        padded = np.pad(ids[:, start:stop], ((0, 0), (0, 2)), constant_values=9)
        mask = np.arange(stop - start + 2)[None] < np.full((BATCH, 1), stop - start)
        options |= {"key_mask": mask, "segment_ids": padded}
        output, state = attend(*part, fm, initial_state=state, return_state=True, **options)
        outputs.append(to_numpy(output)[:, : stop - start])
    assert_close(np.concatenate(outputs, axis=1), expected)
    np.testing.assert_array_equal(to_numpy(state["segment_id"]), ids[:, -1])


@pytest.mark.parametrize("shape", [(1, 9), (BATCH, 8), (BATCH, 9, 1), (9,)])
def test_segments_of_another_shape_are_refused(shape):
    query, key, value = make_qkv(9)
    ids = np.zeros(shape, "int32")
    with pytest.raises(ValueError, match=r"one for each query, here \(2, 9\)"):
        favor_attention(query, key, value, feature_map(), segment_ids=ids)
    for options in ({}, {"sliding_window": 3}):
        with pytest.raises(ValueError, match="segment_ids must be integers of shape"):
            softmax_attention(query, key, value, segment_ids=ids, **options)


def test_an_empty_state_wants_a_built_map():
    with pytest.raises(ValueError, match=r"first call its `build`.*not built"):
        empty_favor_state(FavorPlus(6), 1, 2, 4)
