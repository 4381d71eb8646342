import math

import numpy as np
import oracles
import pytest
from gradients import compiled, gradients
from keras import ops
from samples import make_segments
from tolerances import assert_close, assert_gradients_close, to_numpy

from keras_performer.ops import sliding_window_attention, softmax_weights

BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM = 2, 6, 3, 5, 7


def make_qkv(length, key_length=None, seed=0, scale=1.5):
    rng = np.random.default_rng(seed)
    key_length = key_length or length
    query = scale * rng.standard_normal((BATCH, length, HEADS, HEAD_DIM))
    key = scale * rng.standard_normal((BATCH, key_length, KEY_HEADS, HEAD_DIM))
    value = rng.standard_normal((BATCH, key_length, KEY_HEADS, VALUE_DIM))
    return tuple(x.astype("float32") for x in (query, key, value))


def make_mask(*shape):
    return np.random.default_rng(1).random(shape) > 0.3


def visible_pairs(length, key_length, window, *, causal=False, key_mask=None, segment_ids=None):
    """Who sees whom, (B, N, T, S)."""
    rows, columns = np.arange(length)[:, None], np.arange(key_length)[None]
    visible = np.abs(rows - columns) < window
    if causal:
        visible = visible & (columns <= rows)
    visible = np.broadcast_to(visible, (BATCH, HEADS, *visible.shape))
    if key_mask is not None:
        groups = HEADS // KEY_HEADS
        key_mask = key_mask[:, None] if key_mask.ndim == 2 else np.repeat(key_mask, groups, axis=1)
        visible = visible & key_mask[:, :, None]
    if segment_ids is not None:
        runs = oracles.segment_runs(segment_ids)
        visible = visible & (runs[:, None, :, None] == runs[:, None, None, :])
    return visible


def dense_weights(query, key, visible):
    """The whole matrix (B, N, T, S), in float64."""
    key = np.repeat(key, HEADS // KEY_HEADS, axis=2).astype("float64")
    scores = np.einsum("btnh,bsnh->bnts", query.astype("float64"), key) / math.sqrt(HEAD_DIM)
    scores = np.where(visible, scores, -np.inf)
    scores = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e30))
    # A row that sees nothing is zero, not the average of what it must not see.
    return scores / np.maximum(scores.sum(axis=-1, keepdims=True), 1e-300)


def dense(query, key, value, window, **options):
    visible = visible_pairs(query.shape[1], key.shape[1], window, **options)
    value = np.repeat(value, HEADS // KEY_HEADS, axis=2)
    return np.einsum("bnts,bsnv->btnv", dense_weights(query, key, visible), value)


def differentiable_dense(query, key, value, window, **options):
    """The same in the backend's own operators."""
    visible = visible_pairs(query.shape[1], key.shape[1], window, **options)
    key, value = (ops.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (key, value))
    scores = ops.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(HEAD_DIM)
    weights = ops.softmax(ops.where(visible, scores, -1e9), axis=-1)
    return ops.einsum("bnts,bsnv->btnv", ops.where(visible, weights, 0.0), value)


def attend(query, key, value, window, **options):
    function = compiled(lambda *x: sliding_window_attention(*x, window, **options))
    return to_numpy(function(query, key, value))


# Against the float64 loop over pairs.

MASKS = {
    "plain": {},
    "keys": {"key_mask": make_mask(BATCH, 13)},
    "keys_per_head": {"key_mask": make_mask(BATCH, KEY_HEADS, 13)},
    "segments": {"segment_ids": make_segments(13)},
    "keys_and_segments": {"key_mask": make_mask(BATCH, 13), "segment_ids": make_segments(13)},
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("window", "masks"),
    [*((window, "plain") for window in (1, 2, 13, 17)), *((5, masks) for masks in MASKS)],
)
def test_equals_a_float64_loop_over_pairs(window, masks, causal):
    query, key, value = make_qkv(13)
    options = {"causal": causal, **MASKS[masks]}
    output = attend(query, key, value, window, **options)
    if masks == "keys_per_head":  # the oracle's masks are for query heads
        options["key_mask"] = np.repeat(options["key_mask"], HEADS // KEY_HEADS, axis=1)
    expected = oracles.softmax_attention_loop(query, key, value, sliding_window=window, **options)
    assert_close(output, expected)
    assert_close(dense(query, key, value, window, causal=causal, **MASKS[masks]), expected)


# Against the whole matrix, which the loop above vouches for, at lengths with several blocks.


# A block is as long as the window, and at least 64. Each window meets lengths of less than a block,
# a block, and a token or many more, each length is causal and not.
@pytest.mark.parametrize(
    ("window", "lengths"),
    [
        (1, (1, 64, 200)),
        (2, (63, 65, 129)),
        (63, (1, 128)),
        (64, (63, 64, 65)),
        (65, (64, 65, 200)),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_around_the_blocks(window, lengths, causal):
    for length in lengths:
        check_against_whole_matrix(length, length, window, causal=causal)


def check_against_whole_matrix(length, key_length, window, **options):
    query, key, value = make_qkv(length, key_length)
    output = attend(query, key, value, window, **options)
    expected = dense(query, key, value, window, **options)
    assert_close(output, expected)
    return expected


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [3, 71])
def test_masks_across_blocks(window, causal):
    options = {"key_mask": make_mask(BATCH, KEY_HEADS, 157), "segment_ids": make_segments(157)}
    options["key_mask"][0, 1, :80] = False
    expected = check_against_whole_matrix(157, 157, window, causal=causal, **options)
    # Some row sees nothing.
    assert (expected == 0).all(axis=-1).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "key_length"), [(5, 151), (151, 5), (70, 131), (131, 70)])
def test_queries_and_keys_of_different_lengths(length, key_length, causal):
    mask = make_mask(BATCH, key_length)
    check_against_whole_matrix(length, key_length, 67, causal=causal, key_mask=mask)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_equal_those_of_the_whole_matrix(causal):
    query, key, value = make_qkv(83)
    options = {
        "causal": causal,
        "key_mask": make_mask(BATCH, 83),
        "segment_ids": make_segments(83),
    }
    probe = np.random.default_rng(3).standard_normal((BATCH, 83, HEADS, VALUE_DIM))
    probe = probe.astype("float32")

    def grads_of(function):
        def loss(*x):
            return ops.sum(ops.multiply(function(*x, 11, **options), probe))

        return gradients(loss, query, key, value)[1]

    expected = grads_of(differentiable_dense)
    masked = ~options["key_mask"]
    key[masked], value[masked] = np.nan, np.nan
    actual = grads_of(sliding_window_attention)
    assert_gradients_close(actual, expected)
    for grad in actual[1:]:
        assert (grad[masked] == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_types(dtype):
    # Scores of about 25, which 16 bits would round by more than the tolerance.
    query, key, value = (ops.cast(x, dtype) for x in make_qkv(131, scale=5.0))
    output = sliding_window_attention(query, key, value, 23, causal=True)
    assert output.dtype == query.dtype
    exact = dense(*(to_numpy(ops.cast(x, "float32")) for x in (query, key, value)), 23, causal=True)
    assert_close(output, exact, dtype)


def test_norms_and_padding_without_meaning():
    # Scores of thousands, and NaN where keys are masked: neither leaves the masked keys.
    query, key, value = make_qkv(71, scale=100.0)
    mask = make_mask(BATCH, 71)
    expected = dense(query, key, value, 7, key_mask=mask)
    key[~mask], value[~mask] = np.nan, np.nan
    output = attend(query, key, value, 7, key_mask=mask)
    np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_weights_are_those_of_the_output(masks, causal):
    query, key, _ = make_qkv(13)
    options = {"causal": causal, **MASKS[masks]}
    function = compiled(lambda *x: softmax_weights(*x, sliding_window=4, **options))
    weights = to_numpy(function(query, key))
    visible = visible_pairs(13, 13, 4, **options)
    assert_close(weights, dense_weights(query, key, visible))
    np.testing.assert_allclose(weights.sum(axis=-1), visible.any(axis=-1), rtol=1e-5)


@pytest.mark.parametrize("window", [0, -3, 2.5, None])
def test_a_window_that_is_no_positive_integer_is_refused(window):
    query, key, value = make_qkv(5)
    with pytest.raises(ValueError, match=rf"positive integer.*sliding_window={window}"):
        sliding_window_attention(query, key, value, window)
