"""The exact near field of `favor_attention`, for every implementation that has one."""

import itertools

import numpy as np
import oracles
import pytest
from gradients import attend, attention_gradients, gradients, implementations
from keras import ops
from marks import slow_on_jax, slow_where_compiled
from samples import make_segments
from test_favor_attention import (
    BATCH,
    FEATURES,
    HEADS,
    KEY_HEADS,
    UNMASKED,
    VALUE_DIM,
    feature_map,
    make_direction,
    make_qkv,
)
from tolerances import assert_close, assert_gradients_close, relative_rms, to_numpy
from tolerances import assert_states_close as assert_sums_close

from keras_performer.feature_maps import ELU, FavorPlus, ReLU
from keras_performer.ops import (
    _blocked,
    empty_favor_state,
    favor_attention,
    favor_attention_weights,
    softmax_attention,
)

pytestmark = pytest.mark.usefixtures("short_steps")

NEAR = implementations(4)
STATEFUL = implementations(4, segmented=True, stateful=True)
# With every kind of segments that it takes.
FAST = [
    (name, segmented)
    for segmented in (False, True)
    for name in implementations(4, segmented)
    if name != "reference"
]
# One for each key head.
FAR_BIAS = np.linspace(-2.0, 1.0, KEY_HEADS, dtype="float32")
# Where time is short the causal pass, which also carries runs, stands for both.
NOT_CAUSAL = pytest.param(False, marks=pytest.mark.slow_on_jax)
# (length, window): one tile, several, a window as long as the sequence, an odd one.
SIZES = [
    (1, 4),
    pytest.param(13, 4, marks=pytest.mark.slow_on_jax),
    pytest.param(20, 32, marks=pytest.mark.slow_on_jax),
    # On JAX the test of gradients takes the same way at 150 tokens.
    pytest.param(300, 16, marks=pytest.mark.slow_on_jax),
    pytest.param(300, 75, marks=pytest.mark.slow_on_jax),
    pytest.param(257, 64, marks=pytest.mark.slow_on_jax),
]


def make_mask(length, seed=2):
    mask = np.random.default_rng(seed).random((BATCH, length)) > 0.3
    mask[0, : length // 4] = False
    mask[:, length // 4] = True
    return mask


def make_options(length, masked, segmented):
    options = {}
    if masked:
        options["key_mask"] = make_mask(length)
    if segmented:
        options["segment_ids"] = make_segments(length)
    return options


def make_direction_of(options, length):
    """Nothing for tokens that take no part."""
    mask = options.get("key_mask", np.ones((BATCH, length), bool))
    return make_direction(length) * mask[:, :, None, None]


def unmasked(output, options):
    """The outputs of tokens that take part; what the others give is not specified."""
    mask = options.get("key_mask")
    return to_numpy(output) if mask is None else to_numpy(output)[mask]


def assert_states_close(actual, expected):
    assert set(actual) == set(expected)
    assert_sums_close(actual, expected)
    for name in set(expected) - {"kv", "k_sum", "log_max"}:
        a, e = to_numpy(actual[name]), to_numpy(expected[name])
        mask = name.split("_")[0] + "_mask"
        if name.endswith(("key", "value")):
            a, e = (x[to_numpy(expected[mask])] for x in (a, e))
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize(
    ("implementation", "segmented"),
    [(name, segmented) for segmented in (False, True) for name in implementations(4, segmented)],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [UNMASKED, True])
def test_equals_a_float64_loop_over_pairs(implementation, causal, masked, segmented):
    length, window = 23, 3
    query, key, value = make_qkv(length)
    options = make_options(length, masked, segmented)
    fm = feature_map()
    output = attend(
        query,
        key,
        value,
        fm,
        causal=causal,
        exact_window=window,
        num_sink_tokens=2,
        far_bias=FAR_BIAS,
        implementation=implementation,
        **options,
    )
    groups = HEADS // KEY_HEADS
    key, value = (np.repeat(x, groups, axis=2) for x in (key, value))
    logs = [oracles.favor_log_features(x, to_numpy(fm.projection)) for x in (query, key)]
    expected = oracles.windowed_attention_loop(
        query,
        key,
        value,
        *logs,
        window,
        2,
        far_bias=np.repeat(FAR_BIAS, groups),
        causal=causal,
        **options,
    )
    assert_close(unmasked(output, options), unmasked(expected, options))


@pytest.mark.parametrize(("implementation", "segmented"), FAST)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [UNMASKED, True])
@pytest.mark.parametrize(("length", "window"), SIZES)
def test_equals_the_reference(implementation, causal, masked, segmented, length, window):
    query, key, value = make_qkv(length)
    options = {"causal": causal, "exact_window": window, "num_sink_tokens": 3}
    options |= make_options(length, masked, segmented)
    options["far_bias"] = FAR_BIAS
    fm = feature_map()
    expected = attend(query, key, value, fm, implementation="reference", **options)
    actual = attend(query, key, value, fm, implementation=implementation, **options)
    assert_close(unmasked(actual, options), unmasked(expected, options))


@pytest.mark.parametrize(("implementation", "segmented"), FAST)
@pytest.mark.parametrize("causal", [NOT_CAUSAL, True])
@pytest.mark.parametrize("masked", [UNMASKED, True])
def test_gradients_equal_the_reference(implementation, causal, masked, segmented):
    length = 150
    arrays, fm = make_qkv(length), feature_map()
    options = {"causal": causal, "exact_window": 16, "num_sink_tokens": 3}
    options |= make_options(length, masked, segmented)
    direction = make_direction_of(options, length)
    _, expected = attention_gradients(*arrays, fm, direction, implementation="reference", **options)
    _, actual = attention_gradients(
        *arrays, fm, direction, implementation=implementation, **options
    )
    assert_gradients_close(actual, expected)
    assert all(np.abs(g).max() > 1e-2 for g in actual)


@pytest.mark.parametrize("causal", [NOT_CAUSAL, True])
@pytest.mark.parametrize("masked", [UNMASKED, True])
def test_several_steps_of_blocks_equal_the_reference(causal, masked, monkeypatch):
    """With steps as short as the reference can follow: guards what one step gives the next."""
    monkeypatch.setattr(_blocked, "_STEP", 16)
    length = 75
    arrays, fm = make_qkv(length), feature_map()
    options = {"causal": causal, "exact_window": 4, "num_sink_tokens": 3}
    options |= make_options(length, masked, segmented=False)
    direction = make_direction_of(options, length)
    (expected, expected_gradients), (actual, actual_gradients) = (
        attention_gradients(*arrays, fm, direction, implementation=name, **options)
        for name in ("reference", "blocked")
    )
    assert_close(unmasked(actual, options), unmasked(expected, options))
    assert_gradients_close(actual_gradients, expected_gradients)


@pytest.mark.parametrize("causal", [NOT_CAUSAL, True])
def test_gradients_through_a_state_equal_the_reference(causal):
    """Guards against a window, a sink or a sum that the state passes on without its gradient."""
    first = 45
    query, key, value = make_qkv(80)
    fm = feature_map()
    fm.build(key.shape)
    options = {"causal": causal, "exact_window": 8, "num_sink_tokens": 3}

    def loss(implementation):
        def fn(query, key, value):
            parts = [[x[:, :first], x[:, first:]] for x in (query, key, value)]
            state, total = None, 0.0
            for arrays in zip(*parts, strict=True):
                out, state = favor_attention(
                    *arrays,
                    fm,
                    initial_state=state,
                    return_state=True,
                    implementation=implementation,
                    **options,
                )
                total = total + ops.sum(ops.square(out))
            return total

        return fn

    _, expected = gradients(loss("reference"), query, key, value)
    _, actual = gradients(loss("auto"), query, key, value)
    assert_gradients_close(actual, expected)
    assert np.abs(actual[1][:, :first]).max() > 1e-2


@pytest.mark.parametrize("causal", [NOT_CAUSAL, True])
def test_the_far_bias_has_a_gradient(causal):
    length = 150
    query, key, value = make_qkv(length)
    fm, direction = feature_map(), make_direction(length)
    fm.build(key.shape)

    def loss(implementation):
        def fn(far_bias):
            output = favor_attention(
                query,
                key,
                value,
                fm,
                causal=causal,
                exact_window=16,
                far_bias=far_bias,
                implementation=implementation,
            )
            return ops.sum(ops.multiply(output, direction))

        return fn

    _, (expected,) = gradients(loss("reference"), FAR_BIAS)
    assert np.abs(expected).min() > 1e-2
    for implementation in set(NEAR) - {"reference"}:
        _, (actual,) = gradients(loss(implementation), FAR_BIAS)
        assert_gradients_close([actual], [expected])


# Laws.


@pytest.mark.parametrize("implementation", NEAR)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow_on_jax), 8.0])
@pytest.mark.parametrize("window", [37, pytest.param(64, marks=pytest.mark.slow_on_jax)])
def test_a_window_as_long_as_the_sequence_is_softmax_attention(
    implementation, causal, scale, window
):
    query, key, value = make_qkv(37, scale=scale)
    mask = make_mask(37)
    options = {"causal": causal, "key_mask": mask}
    output = attend(
        query,
        key,
        value,
        feature_map(),
        exact_window=window,
        implementation=implementation,
        **options,
    )
    key_, value_ = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (key, value))
    expected = oracles.softmax_attention_loop(query, key_, value_, **options)
    # Logits of hundreds round to 1e-5 in float32.
    tolerance = 1e-6 if scale == 1.0 else 1e-4
    assert relative_rms(to_numpy(output)[mask], expected[mask]) < tolerance
    ours = softmax_attention(query, key, value, **options)
    assert relative_rms(to_numpy(output)[mask], to_numpy(ours)[mask]) < 10 * tolerance


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_of_half_the_length_is_softmax_attention_too(causal):
    """Two blocks see each other: guards against a window that is too narrow by a block."""
    query, key, value = make_qkv(300)
    output = attend(query, key, value, feature_map(), causal=causal, exact_window=150)
    assert_close(output, softmax_attention(query, key, value, causal=causal), "layer")


@pytest.mark.parametrize("implementation", NEAR)
@pytest.mark.parametrize("place", [0, 40, 128, 150])
def test_the_future_does_not_matter(implementation, place):
    length = 190
    query, key, value = make_qkv(length)
    later = make_qkv(length, seed=9)
    changed = [x.copy() for x in (query, key, value)]
    for new, other, scale in zip(changed, later, (1.0, 8.0, 100.0), strict=True):
        new[:, place + 1 :] = scale * other[:, place + 1 :]
    fm = feature_map()
    options = {
        "causal": True,
        "exact_window": 16,
        "num_sink_tokens": 3,
        "implementation": implementation,
    }
    before = to_numpy(attend(query, key, value, fm, **options))[:, : place + 1]
    after = to_numpy(attend(*changed, fm, **options))[:, : place + 1]
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("implementation", NEAR)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_matter(implementation, causal, left):
    length, padding = 90, 77
    query, key, value = make_qkv(length)
    fm = feature_map()
    options = {
        "causal": causal,
        "exact_window": 16,
        "num_sink_tokens": 3,
        "implementation": implementation,
    }
    expected = attend(query, key, value, fm, **options)
    for filler in (0.0, 30.0, np.nan):
        width = [(0, 0), (padding, 0) if left else (0, padding), (0, 0), (0, 0)]
        padded = [np.pad(x, width, constant_values=filler) for x in (key, value)]
        padded_query = np.pad(query, width, constant_values=0.0 if filler != filler else filler)
        mask = np.pad(np.ones((BATCH, length), bool), width[:2])
        output = to_numpy(attend(padded_query, *padded, fm, key_mask=mask, **options))
        assert_close(output[:, padding:] if left else output[:, :length], expected)
        assert np.isfinite(output).all()


@pytest.mark.parametrize("causal", [False, True])
def test_segments_equal_separate_calls(causal):
    length = 300
    query, key, value = make_qkv(length)
    segments = np.zeros((BATCH, length), "int32")
    bounds = [0, 3, 90, 200, length]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        segments[:, start:stop] = i % 2
    fm = feature_map()
    options = {"causal": causal, "exact_window": 16, "num_sink_tokens": 3}
    output = to_numpy(attend(query, key, value, fm, segment_ids=segments, **options))
    for start, stop in itertools.pairwise(bounds):
        alone = attend(*(x[:, start:stop] for x in (query, key, value)), fm, **options)
        assert_close(output[:, start:stop], alone)


@pytest.mark.parametrize("causal", [False, True])
def test_a_constant_value_comes_back_and_no_key_gives_zeros(causal):
    length = 200
    query, key, value = make_qkv(length)
    value[:] = 3.5
    mask = np.ones((BATCH, length), bool)
    mask[0] = False
    output = to_numpy(
        attend(query, key, value, feature_map(), causal=causal, exact_window=16, key_mask=mask)
    )
    assert (output[0] == 0).all()
    assert_close(output[1], np.full((length, HEADS, VALUE_DIM), 3.5))


@pytest.mark.parametrize("causal", [False, True])
def test_dropping_keys_of_one_head_moves_no_block(causal):
    """The grid of blocks follows keys that any head sees, so attention dropout cannot move it."""
    length = 60
    query, key, value = make_qkv(length)
    fm = feature_map()
    options = {"causal": causal, "exact_window": 8, "num_sink_tokens": 3}
    expected = to_numpy(attend(query, key, value, fm, **options))
    mask = np.ones((BATCH, KEY_HEADS, length), bool)
    mask[:, 0, :11] = False
    output = to_numpy(attend(query, key, value, fm, key_mask=mask, **options))
    groups = HEADS // KEY_HEADS
    assert_close(output[:, :, groups:], expected[:, :, groups:])
    assert np.abs(output[:, :, :groups] - expected[:, :, :groups]).max() > 1e-2


@pytest.mark.parametrize("scale", [100.0, 1000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_norms_give_finite_averages(scale, causal):
    query, key, value = make_qkv(150, scale=scale)
    fm = feature_map()
    fm.build(key.shape)

    def fn(query, key, value):
        return ops.sum(
            ops.square(favor_attention(query, key, value, fm, causal=causal, exact_window=16))
        )

    output = to_numpy(attend(query, key, value, fm, causal=causal, exact_window=16))
    assert np.abs(output).max() <= np.abs(value).max() * 1.01
    assert (np.abs(output).sum(axis=-1) > 0).all()
    _, grads = gradients(fn, query, key, value)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("causal", [False, True])
def test_other_float_types(dtype, causal):
    query, key, value = make_qkv(150)
    fm = feature_map()
    options = {"causal": causal, "exact_window": 16, "num_sink_tokens": 3}
    expected = attend(query, key, value, fm, **options)
    cast = [ops.cast(ops.convert_to_tensor(x), dtype) for x in (query, key, value)]
    actual = attend(*cast, fm, **options)
    assert actual.dtype == cast[0].dtype
    assert_close(ops.cast(actual, "float32"), expected, "float32" if dtype == "float64" else dtype)


# State.


@pytest.mark.parametrize("implementation", STATEFUL)
@pytest.mark.parametrize("segmented", [*slow_on_jax(False), True])
@pytest.mark.parametrize(
    "splits",
    [
        (129,),
        tuple(range(1, 40)),
        *slow_where_compiled((1,), (64,), (5, 6, 100, 137)),
    ],
)
def test_split_and_resume_equals_one_call(implementation, segmented, splits):
    length, window = 170, 8
    query, key, value = make_qkv(length)
    mask = make_mask(length)
    # Masked keys at the end of a call with a state are padding.
    mask[0, [s - 1 for s in splits if s > length // 4]] = True
    mask[1, [s - 1 for s in splits]] = True
    options = {"key_mask": mask}
    if segmented:
        options["segment_ids"] = make_segments(length)
    fm = feature_map()
    common = {
        "causal": True,
        "implementation": implementation,
        "return_state": True,
        "exact_window": window,
        "num_sink_tokens": 3,
        "far_bias": FAR_BIAS,
    }
    expected, last = attend(query, key, value, fm, **common, **options)
    if segmented:
        state = None
    else:
        state = empty_favor_state(fm, BATCH, KEY_HEADS, VALUE_DIM, "float32", window, 3)
    outputs, sizes = [], set()
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
        sizes.add(tuple((name, tuple(state[name].shape)) for name in sorted(state)))
    last_token = length - 1 - np.argmax(mask[:, ::-1], axis=1)
    taken = mask & (np.arange(length) <= last_token[:, None])
    assert_close(np.concatenate(outputs, axis=1)[taken], to_numpy(expected)[taken])
    assert_states_close(state, last)
    assert len(sizes) == 1


@pytest.mark.parametrize("implementation", sorted(set(STATEFUL) - {"reference"}))
@pytest.mark.slow_on_jax
def test_the_returned_state_equals_the_reference(implementation):
    length = 300
    query, key, value = make_qkv(length)
    mask = make_mask(length)
    mask[0, 200:] = False  # rows end at different places
    for window, segmented in itertools.product((8, 64, 200), (False, True)):
        options = {"key_mask": mask, "causal": True, "return_state": True}
        options |= {"exact_window": window, "num_sink_tokens": 3}
        if segmented:
            options["segment_ids"] = make_segments(length)
        fm = feature_map()
        _, expected = attend(query, key, value, fm, implementation="reference", **options)
        _, actual = attend(query, key, value, fm, implementation=implementation, **options)
        assert_states_close(actual, expected)


@pytest.mark.parametrize("implementation", STATEFUL)
def test_ragged_rows_decode_token_by_token(implementation):
    """A prompt padded on the right, one padded on the left, then one token at a time."""
    length, prompt = 60, 30
    query, key, value = make_qkv(length)
    fm = feature_map()
    common = {
        "causal": True,
        "exact_window": 8,
        "num_sink_tokens": 3,
        "implementation": implementation,
    }
    expected = to_numpy(attend(query, key, value, fm, **common))
    mask = np.ones((BATCH, prompt), bool)
    mask[0, 13:] = False
    mask[1, :9] = False
    moved = [x.copy() for x in (query, key, value)]
    for x, original in zip(moved, (query, key, value), strict=True):
        x[0, 13:prompt] = np.nan if original is not query else 0.0
        x[1, 9:prompt] = original[1, : prompt - 9]
    output, state = attend(
        *(x[:, :prompt] for x in moved), fm, key_mask=mask, return_state=True, **common
    )
    output = to_numpy(output)
    assert_close(output[0, :13], expected[0, :13])
    assert_close(output[1, 9:], expected[1, : prompt - 9])
    np.testing.assert_array_equal(to_numpy(state["window_position"]), [13, prompt - 9])
    for step in range(25):
        places = [13 + step, prompt - 9 + step]
        token = [
            np.stack([x[b, place] for b, place in enumerate(places)])[:, None]
            for x in (query, key, value)
        ]
        output, state = attend(*token, fm, initial_state=state, return_state=True, **common)
        for b, place in enumerate(places):
            assert_close(to_numpy(output)[b, 0], expected[b, place])


@pytest.mark.parametrize("implementation", STATEFUL)
def test_bidirectional_states_join_the_far_field(implementation):
    """The keys of a bidirectional or of a causal state are far, every one of them once."""
    query, key, value = make_qkv(90)
    fm = feature_map()
    sizes = {"exact_window": 8, "num_sink_tokens": 3}
    common = {"implementation": implementation, **sizes}
    head, tail = ([x[:, part] for x in (query, key, value)] for part in (slice(60), slice(60, 90)))
    _, plain = attend(*head, fm, return_state=True)  # feature sums of all keys
    _, state = attend(*head, fm, return_state=True, **common)
    assert_sums_close(state, plain)
    expected, after = attend(*tail, fm, initial_state=state, return_state=True, **common)
    _, causal = attend(*head, fm, causal=True, return_state=True, **common)
    output, last = attend(*tail, fm, initial_state=causal, return_state=True, **common)
    assert_close(output, expected)
    assert set(last) == set(causal)
    assert_sums_close(last, after)
    reference = attend(*tail, fm, initial_state=state, **sizes, implementation="reference")
    assert_close(expected, reference)


def test_an_empty_state_is_none():
    query, key, value = make_qkv(40)
    fm = feature_map()
    options = {"causal": True, "exact_window": 8, "num_sink_tokens": 3}
    expected = attend(query, key, value, fm, **options)
    state = empty_favor_state(fm, BATCH, KEY_HEADS, VALUE_DIM, "float32", 8, 3)
    assert_close(attend(query, key, value, fm, initial_state=state, **options), expected)


# Weights to look at, and bad input.


@pytest.mark.parametrize("causal", [False, True])
def test_weights_reproduce_the_output(causal):
    query, key, value = make_qkv(30)
    options = {"causal": causal, "exact_window": 4, "num_sink_tokens": 2, "far_bias": FAR_BIAS}
    fm, mask = feature_map(), make_mask(30)
    weights = to_numpy(favor_attention_weights(query, key, fm, key_mask=mask, **options))
    output = to_numpy(attend(query, key, value, fm, key_mask=mask, **options))
    repeated = np.repeat(value, HEADS // KEY_HEADS, axis=2)
    assert_close(np.einsum("bnts,bsnv->btnv", weights, repeated)[mask], output[mask])


@pytest.mark.slow_on_jax
def test_what_has_no_near_field_is_refused():
    query, key, value = make_qkv(9)
    fm = feature_map()
    for other in (ReLU(FEATURES), ELU(), FavorPlus(FEATURES, legacy_epsilon=1e-4)):
        with pytest.raises(ValueError, match="estimates another kernel"):
            favor_attention(query, key, value, other, exact_window=4)
    with pytest.raises(ValueError, match="in cross-attention no key is near"):
        favor_attention(query, key[:, :5], value[:, :5], fm, exact_window=4)
    with pytest.raises(ValueError, match="needs an exact_window"):
        favor_attention(query, key, value, fm, num_sink_tokens=2)
    with pytest.raises(ValueError, match="without one it would cancel"):
        favor_attention(query, key, value, fm, far_bias=FAR_BIAS)
    with pytest.raises(ValueError, match=f"one number for each of the {KEY_HEADS} key heads"):
        favor_attention(query, key, value, fm, exact_window=4, far_bias=np.zeros(KEY_HEADS + 1))
    for bad in (-1, 2.5, "4"):
        with pytest.raises(ValueError, match="exact_window must be an integer of at least 0"):
            favor_attention(query, key, value, fm, exact_window=bad)
    with pytest.raises(NotImplementedError, match="has no exact near field"):
        favor_attention(query, key, value, fm, exact_window=4, implementation="chunked")
    for implementation in ("windowed", "blocked"):
        with pytest.raises(NotImplementedError, match="set exact_window"):
            favor_attention(query, key, value, fm, implementation=implementation)
    with pytest.raises(NotImplementedError, match="take 'windowed' for segment_ids and states"):
        options = {"exact_window": 4, "implementation": "blocked"}
        favor_attention(query, key, value, fm, return_state=True, **options)
    options = {"causal": True, "exact_window": 4}
    _, state = favor_attention(query, key, value, fm, return_state=True, **options)
    with pytest.raises(ValueError, match="pass the same exact_window"):
        favor_attention(query, key, value, fm, causal=True, initial_state=state)
    with pytest.raises(ValueError, match=r"initial_state\['window_key'\] must have the shape"):
        favor_attention(query, key, value, fm, causal=True, exact_window=5, initial_state=state)
    with pytest.raises(ValueError, match="must be a state that favor_attention returned"):
        favor_attention(query, key, value, fm, num_sink_tokens=1, initial_state=state, **options)


@pytest.mark.parametrize("implementation", STATEFUL)
def test_segments_may_change_at_every_call_of_one_token(implementation):
    query, key, value = make_qkv(6)
    ids = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 2, 2, 3, 3]], "int32")
    common = {"causal": True, "exact_window": 2, "num_sink_tokens": 1, "return_state": True}
    common["implementation"] = implementation
    fm = feature_map()
    expected, last = attend(query, key, value, fm, segment_ids=ids, **common)
    outputs, state = [], None
    for t in range(6):
        one = slice(t, t + 1)
        part = (x[:, one] for x in (query, key, value))
        output, state = attend(*part, fm, segment_ids=ids[:, one], initial_state=state, **common)
        outputs.append(to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), expected)
    assert_states_close(state, last)


@pytest.mark.parametrize("length", [40, 170])
def test_more_sinks_than_the_windows_beside_a_tile_hold(length):
    """A segment begins just before the end of a tile of 128; its sinks are in the next one."""
    query, key, value = make_qkv(length)
    ids = np.repeat((np.arange(length) >= min(127, length - 3))[None], BATCH, 0).astype("int32")
    fm = feature_map()
    options = {"exact_window": 2, "num_sink_tokens": 12, "segment_ids": ids}
    expected = attend(query, key, value, fm, implementation="reference", **options)
    assert_close(attend(query, key, value, fm, implementation="windowed", **options), expected)
