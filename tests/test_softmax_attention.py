"""Exact attention, the baseline: against dense weights in float64, and its state."""

import itertools

import numpy as np
import pytest
from gradients import call
from samples import make_segments
from test_sliding_window import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    VALUE_DIM,
    dense_weights,
    make_mask,
    make_qkv,
    visible_pairs,
)
from tolerances import assert_close, to_numpy

from keras_performer.ops import empty_softmax_state, softmax_attention, softmax_weights

EVERYTHING = 10**6


def expected_output(query, key, value, **masks):
    window = masks.pop("window", EVERYTHING)
    visible = visible_pairs(query.shape[1], key.shape[1], window, **masks)
    value = np.repeat(value, HEADS // KEY_HEADS, axis=2)
    weights = dense_weights(query, key, visible)
    return np.einsum("bnts,bsnv->btnv", weights, value.astype("float64"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masks", ["none", "keys", "heads", "segments", "all"])
def test_equals_dense_weights(causal, masks):
    query, key, value = make_qkv(13)
    options = {"causal": causal}
    if masks in ("keys", "all"):
        options["key_mask"] = make_mask(BATCH, 13)
    if masks == "heads":
        options["key_mask"] = make_mask(BATCH, KEY_HEADS, 13)
    if masks in ("segments", "all"):
        options["segment_ids"] = make_segments(13)
    output = call(softmax_attention, query, key, value, **options)
    assert_close(output, expected_output(query, key, value, **options))
    weights = to_numpy(call(softmax_weights, query, key, **options))
    repeated = np.repeat(value, HEADS // KEY_HEADS, axis=2)
    assert_close(np.einsum("bnts,bsnv->btnv", weights, repeated), output)


def test_one_key_head_serves_all_queries():
    query, key, value = make_qkv(13)
    key, value, options = key[:, :, :1], value[:, :, :1], {"key_mask": make_mask(BATCH, 13)}
    expected = call(
        softmax_attention, query, *(np.repeat(t, KEY_HEADS, 2) for t in (key, value)), **options
    )
    assert_close(call(softmax_attention, query, key, value, **options), expected)
    state = empty_softmax_state(BATCH, 13, 1, HEAD_DIM, VALUE_DIM, "float32")
    assert_close(
        call(softmax_attention, query, key, value, initial_state=state, **options), expected
    )


def test_cross_attention_equals_dense_weights():
    query, key, value = make_qkv(7, 19)
    assert_close(call(softmax_attention, query, key, value), expected_output(query, key, value))


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_masked_key_holds_does_not_matter(causal):
    query, key, value = make_qkv(11)
    mask = make_mask(BATCH, 11)
    mask[0] = False
    expected = call(softmax_attention, query, key, value, causal=causal, key_mask=mask)
    assert np.all(to_numpy(expected)[0] == 0)
    key[~mask], value[~mask] = np.nan, np.nan
    output = call(softmax_attention, query, key, value, causal=causal, key_mask=mask)
    np.testing.assert_array_equal(to_numpy(output), to_numpy(expected))


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("splits", [(1, 2, 3), (5,), (4, 5, 17), (20,)])
def test_causal_splits_equal_one_call(window, splits):
    length = 23
    query, key, value = make_qkv(length)
    mask = make_mask(BATCH, length)
    mask[:, [stop - 1 for stop in splits]] = True  # padding at a chunk's end is not counted
    expected = expected_output(
        query, key, value, causal=True, key_mask=mask, window=window or EVERYTHING
    )
    capacity = length if window is None else window - 1
    state = empty_softmax_state(BATCH, capacity, KEY_HEADS, HEAD_DIM, VALUE_DIM, "float32")
    outputs = []
    for start, stop in itertools.pairwise((0, *splits, length)):
        output, state = call(
            softmax_attention,
            *(x[:, start:stop] for x in (query, key, value)),
            causal=True,
            sliding_window=window,
            key_mask=mask[:, start:stop],
            initial_state=state,
            return_state=True,
        )
        assert state["key"].shape == (BATCH, capacity, KEY_HEADS, HEAD_DIM)
        outputs.append(to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), expected)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("size", [3, 9])
def test_bidirectional_chunks_see_themselves_and_what_came_before(window, size):
    query, key, value = make_qkv(18)
    capacity = 18 if window is None else window - 1
    state = empty_softmax_state(BATCH, capacity, KEY_HEADS, HEAD_DIM, VALUE_DIM, "float32")
    for stop in range(size, 19, size):
        chunk = slice(stop - size, stop)
        output, state = call(
            softmax_attention,
            *(x[:, chunk] for x in (query, key, value)),
            sliding_window=window,
            initial_state=state,
            return_state=True,
        )
        whole = expected_output(
            *(x[:, :stop] for x in (query, key, value)), window=window or EVERYTHING
        )
        assert_close(output, whole[:, chunk])


@pytest.mark.parametrize("window", [None, 4])
def test_padding_at_the_end_takes_no_room(window):
    query, key, value = make_qkv(9)
    mask = np.arange(6) < np.array([[2], [5]])
    capacity = 9 if window is None else window - 1
    state = empty_softmax_state(BATCH, capacity, KEY_HEADS, HEAD_DIM, VALUE_DIM, "float32")
    options = {"causal": True, "sliding_window": window, "return_state": True}
    for start, stop, key_mask in ((0, 6, mask), (6, 7, mask[:, :1] & False), (6, 9, None)):
        part = (x[:, start:stop] for x in (query, key, value))
        output, state = call(
            softmax_attention, *part, key_mask=key_mask, initial_state=state, **options
        )
    for row, length in enumerate((2, 5)):
        kept = [*range(length), 6, 7, 8]
        alone = expected_output(
            *(np.repeat(x[row : row + 1, kept], BATCH, axis=0) for x in (query, key, value)),
            causal=True,
            window=window or EVERYTHING,
        )
        assert_close(to_numpy(output)[row], alone[0, length:])


def test_a_state_that_is_too_small_forgets_the_first_keys():
    query, key, value = make_qkv(9)
    state = empty_softmax_state(BATCH, 4, KEY_HEADS, HEAD_DIM, VALUE_DIM, "float32")
    _, state = call(
        softmax_attention, query, key, value, causal=True, initial_state=state, return_state=True
    )
    np.testing.assert_array_equal(to_numpy(state["key"]), key[:, 5:])
    output = call(
        softmax_attention, query[:, :1], key[:, :1], value[:, :1], causal=True, initial_state=state
    )
    keys, values = (np.concatenate([x[:, 5:], x[:, :1]], axis=1) for x in (key, value))
    assert_close(output, expected_output(query[:, :1], keys, values))


def test_what_a_state_cannot_have_is_refused():
    query, key, value = make_qkv(5)
    with pytest.raises(ValueError, match="needs the initial_state whose capacity"):
        softmax_attention(query, key, value, return_state=True)
    state = empty_softmax_state(BATCH, 4, KEY_HEADS, HEAD_DIM, VALUE_DIM, "float32")
    with pytest.raises(ValueError, match="no segment_ids"):
        softmax_attention(query, key, value, segment_ids=make_segments(5), initial_state=state)
    with pytest.raises(ValueError, match="Received: key_mask"):
        mask = make_mask(BATCH, KEY_HEADS, 5)
        softmax_attention(query, key, value, key_mask=mask, initial_state=state)
    for wrong in ({}, {**state, "value": state["value"][:1]}):
        with pytest.raises(ValueError, match="initial_state must hold `key`, `value` and"):
            softmax_attention(query, key, value, initial_state=wrong)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}], ids=["dense", "window"])
def test_what_cannot_work_is_refused(options):
    query, key, value = make_qkv(5)
    with pytest.raises(ValueError, match="must be a multiple of the key heads"):
        softmax_attention(query[:, :, :1], key, value, **options)
    with pytest.raises(TypeError, match="query must be floating point"):
        softmax_attention(query.astype("int32"), key, value, **options)
    with pytest.raises(ValueError, match="key_mask must have the shape"):
        softmax_attention(query, key, value, key_mask=np.ones((BATCH, 4), bool), **options)
    with pytest.raises(ValueError, match="segment_ids needs queries and keys"):
        softmax_attention(query, key[:, :3], value[:, :3], segment_ids=make_segments(5), **options)
