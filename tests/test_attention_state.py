"""Streaming and memories of `PerformerAttention`, for feature attention and both baselines."""

import itertools

import keras
import numpy as np
import pytest
from gradients import call
from marks import slow_on_jax
from tolerances import assert_close, to_numpy

from keras_performer.layers import PerformerAttention

pytestmark = pytest.mark.usefixtures("short_steps")

KINDS = {
    "performer": {"num_features": 24},
    "exact_window": {"num_features": 24, "exact_window": 3, "num_sink_tokens": 2, "far_bias": -1.0},
    "relu": {"feature_map": "relu", "num_features": 24},
    "softmax": {"feature_map": None},
    "sliding_window": {"sliding_window": 5},
}
BATCH, WIDTH = 2, 11


def make_layer(kind, **options):
    layer = PerformerAttention(
        **{
            "num_heads": 4,
            "key_dim": 6,
            "num_key_value_heads": 2,
            "qk_norm": True,
            "seed": 1,
            **KINDS[kind],
            **options,
        }
    )
    layer.build((None, None, WIDTH), (None, None, WIDTH))
    return layer


def make_inputs(length, seed=0):
    return np.random.default_rng(seed).standard_normal((BATCH, length, WIDTH)).astype("float32")


def symbols_of(state):
    return {
        name: keras.KerasTensor(tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype))
        for name, tensor in state.items()
    }


def left_padded(length, padding):
    mask = np.ones((BATCH, length), bool)
    mask[0, :padding] = False
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", [*slow_on_jax(0, 8), 2])
@pytest.mark.parametrize("splits", [*slow_on_jax((7,)), (1, 2, 3, 12)])
def test_a_causal_stream_equals_one_call(kind, padding, splits):
    # With 8 tokens of padding the first chunks of a row hold nothing but padding.
    layer = make_layer(kind, rotary_max_wavelength=100)
    x, mask = make_inputs(17), left_padded(17, padding)
    expected = to_numpy(call(layer, x, x, key_mask=mask, use_causal_mask=True))
    state, outputs = layer.initial_state(BATCH, 17), []
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for start, stop in itertools.pairwise((0, *splits, 17)):
        part = x[:, start:stop]
        output, state = call(
            layer,
            part,
            part,
            key_mask=mask[:, start:stop],
            use_causal_mask=True,
            initial_state=state,
            return_state=True,
        )
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
        outputs.append(to_numpy(output))
    np.testing.assert_array_equal(to_numpy(state["position"]), [17 - padding, 17])
    outputs = np.concatenate(outputs, axis=1)
    assert_close(outputs[0, padding:], expected[0, padding:], "layer")
    assert_close(outputs[1], expected[1], "layer")


@pytest.mark.parametrize("kind", ["exact_window", *slow_on_jax("performer")])
@pytest.mark.parametrize("split", [5, *slow_on_jax(3, 12)])
def test_a_stream_of_segments_equals_one_call(kind, split):
    layer = make_layer(kind, rotary_max_wavelength=100)
    x, segment_ids = make_inputs(17), np.array([[0] * 2 + [1] * 11 + [2] * 4, [3] * 17])
    options = {"use_causal_mask": True, "return_state": True}
    expected, _ = call(layer, x, x, segment_ids=segment_ids, **options)
    state, outputs = None, []
    for part in (slice(split), slice(split, 17)):
        state = {} if state is None else {"initial_state": state}
        output, state = call(
            layer, x[:, part], x[:, part], segment_ids=segment_ids[:, part], **state, **options
        )
        outputs.append(to_numpy(output))
    np.testing.assert_array_equal(to_numpy(state["position"]), [17, 17])
    np.testing.assert_array_equal(to_numpy(state["segment_id"]), [2, 3])
    assert_close(np.concatenate(outputs, axis=1), expected, "layer")
    inputs, ids = keras.Input((None, WIDTH)), keras.Input((None,), dtype="int32")
    spec = layer(inputs, inputs, segment_ids=ids, **options)[1]
    assert {name: tensor.dtype for name, tensor in spec.items()} == {
        name: keras.backend.standardize_dtype(tensor.dtype) for name, tensor in state.items()
    } | {"segment_id": "int32"}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"exact_window"}))
def test_a_bidirectional_stream_sees_each_chunk_and_those_before(kind):
    layer = make_layer(kind, rotary_max_wavelength=100)
    x = make_inputs(12)
    state = layer.initial_state(BATCH, 12)
    for stop in (5, 6, 12):
        start = {5: 0, 6: 5, 12: 6}[stop]
        part, before = x[:, start:stop], x[:, :stop]
        output, state = call(layer, part, part, initial_state=state, return_state=True)
        expected = to_numpy(call(layer, before, before))[:, start:]
        assert_close(output, expected, "layer")
    assert (
        np.abs(
            to_numpy(call(layer, x, x))[:, :5] - to_numpy(call(layer, before, before))[:, :5]
        ).max()
        == 0
    )


def test_keys_of_earlier_chunks_are_far_to_an_encoder():
    layer = make_layer("exact_window", far_bias=None)  # which would stand in the sums
    x = make_inputs(12)
    head, tail = x[:, :5], x[:, 5:]
    state = layer.initial_state(BATCH)
    expected, state = call(layer, head, head, initial_state=state, return_state=True)
    assert_close(expected, call(layer, head, head), "layer")
    output, after = call(layer, tail, tail, initial_state=state, return_state=True)
    assert {n: tuple(t.shape) for n, t in after.items()} == {
        n: tuple(t.shape) for n, t in state.items()
    }
    plain = make_layer("performer")
    plain.set_weights(layer.get_weights())
    _, sums = call(plain, head, head, return_state=True)
    alone = {name: state[name] for name in sums}
    assert_close(output, call(layer, tail, tail, initial_state=alone), "layer")
    whole = to_numpy(call(layer, x, x))[:, 5:]
    assert np.abs(to_numpy(output) - whole).max() > 1e-3  # which sees some of them exactly


@pytest.mark.parametrize("kind", ["performer", "relu", "softmax"])
def test_reading_a_memory_equals_one_call(kind):
    layer = make_layer(kind, use_gate=True)
    query, value = make_inputs(7), make_inputs(13, seed=1)
    mask = np.random.default_rng(3).random((BATCH, 13)) > 0.4
    expected = call(layer, query, value, key_mask=mask)
    memory = layer.memory(value, mask)
    assert_close(call(layer.read, query, memory), expected, "layer")
    for t in range(7):
        output = call(layer.read, query[:, t : t + 1], memory)
        assert_close(output, to_numpy(expected)[:, t : t + 1], "layer")
    assert_close(call(layer.read, query, layer.memory(value)), call(layer, query, value), "layer")


def test_the_state_of_feature_attention_does_not_grow():
    layer = make_layer("performer")
    sizes = []
    for length in (3, 300):
        x = make_inputs(length)
        _, state = call(layer, x, x, use_causal_mask=True, return_state=True)
        sizes.append({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert sizes[0] == sizes[1]


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("kind", KINDS)
def test_the_symbolic_state_has_the_shapes_of_the_real_one(kind):
    layer = make_layer(kind)
    x = make_inputs(3)
    state = layer.initial_state(BATCH, 6)
    symbols = symbols_of(state)
    spec, state_spec = layer.compute_output_spec(
        keras.KerasTensor(x.shape),
        keras.KerasTensor(x.shape),
        initial_state=symbols,
        return_state=True,
    )
    output, state = layer(x, x, use_causal_mask=True, initial_state=state, return_state=True)
    assert tuple(spec.shape) == tuple(output.shape)
    for name, tensor in state.items():
        assert tuple(state_spec[name].shape) == tuple(tensor.shape), name
        assert state_spec[name].dtype == keras.backend.standardize_dtype(tensor.dtype), name


@pytest.mark.slow_on_jax
def test_the_symbolic_state_has_a_segment_if_the_call_has():
    layer, x = make_layer("performer"), make_inputs(3)
    ids = np.zeros((BATCH, 3), "int32")
    options = {"use_causal_mask": True, "return_state": True}
    _, state = layer(x, x, segment_ids=ids, **options)
    symbols = symbols_of(state)
    for given in ({}, {"segment_ids": ids}):
        _, after = layer(x, x, initial_state=state, **given, **options)
        spec = layer.compute_state_spec(BATCH, symbols, True, given.get("segment_ids"))
        assert spec.keys() == after.keys()


def test_softmax_attention_equals_that_of_keras():
    ours = PerformerAttention(4, 6, feature_map=None)
    theirs = keras.layers.MultiHeadAttention(4, 6)
    x = make_inputs(9)
    for layer in (ours, theirs):
        layer.build(x.shape, x.shape)
    assert len(ours.weights) == len(theirs.weights)
    ours.set_weights(theirs.get_weights())
    for causal in (False, True):
        expected = theirs(x, x, use_causal_mask=causal)
        assert_close(ours(x, x, use_causal_mask=causal), expected, "layer")
    _, expected = theirs(x, x, return_attention_scores=True)
    assert_close(ours(x, x, return_attention_scores=True)[1], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_share_every_other_weight(kind):
    names = [w.path.split("/", 1)[1] for w in make_layer(kind).weights]
    names = [name for name in names if not name.startswith("far_bias")]
    assert (
        names
        == [
            name
            for name in (w.path.split("/", 1)[1] for w in make_layer("performer").weights)
            if kind not in ("softmax", "sliding_window") or not name.startswith("feature_map")
        ][: len(names)]
    )


def test_what_a_state_cannot_have_is_refused():
    x = make_inputs(3)
    with pytest.raises(ValueError, match="not built"):
        PerformerAttention(2, 4).initial_state(1)
    with pytest.raises(ValueError, match="with max_length"):
        make_layer("softmax").initial_state(BATCH)
    with pytest.raises(ValueError, match="Exact attention needs a state to start from"):
        make_layer("softmax")(x, x, return_state=True)
    for symbolic in (make_layer("softmax"), make_layer("sliding_window")):
        inputs = keras.Input(x.shape[1:])
        with pytest.raises(ValueError, match="Exact attention needs a state to start from"):
            symbolic(inputs, inputs, return_state=True)
    with pytest.raises(ValueError, match="without attention scores"):
        make_layer("performer")(x, x, return_state=True, return_attention_scores=True)
    with pytest.raises(ValueError, match="exact_window=3"):
        make_layer("exact_window").memory(x)
    with pytest.raises(ValueError, match="rotary_max_wavelength=100"):
        make_layer("performer", rotary_max_wavelength=100).memory(x)
