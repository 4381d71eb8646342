"""The fused kernels against the definition, on a CPU in the interpreters of Triton and Pallas.

They are compared in what they promise: outputs, states and every gradient. The laws of attention
that follow from the definition are tested in `test_favor_attention.py`, here those that kernels
break most easily.
"""

import importlib.util
from types import SimpleNamespace

import keras
import numpy as np
import oracles
import pytest
from gradients import attend, attention_gradients, gradients
from keras import ops
from marks import slow_on_jax, slow_where_interpreted
from tolerances import (
    assert_close,
    assert_gradients_close,
    assert_states_close,
    relative_rms,
    to_numpy,
)

from keras_performer.feature_maps import FavorPlus, FavorPlusPlus, ReLU
from keras_performer.ops import _fused, favor_attention
from keras_performer.ops.favor_attention import FUSED

BACKEND = keras.config.backend()
NAME = {"torch": "triton", "jax": "pallas"}.get(BACKEND)
MISSING = None
if NAME is None:
    MISSING = f"there are no fused kernels for the {BACKEND} backend"
elif NAME == "triton" and importlib.util.find_spec("triton") is None:
    MISSING = "triton is not installed"
needs_kernels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# Padded to 16, 16 and two blocks of features.
BATCH, HEADS, KEY_HEADS, HEAD_DIM, VALUE_DIM, FEATURES = 2, 4, 2, 7, 5, 37
CHUNK, WIDE_CHUNK = 32, 64  # of float32 and of 16-bit tensors
LENGTHS = [*slow_on_jax(1), 2 * CHUNK + 11]
CAUSAL_FIRST = [True, *slow_on_jax(False)]  # where causal calls do what the others do, and more


def feature_map(**kwargs):
    fm = FavorPlus(kwargs.pop("num_features", FEATURES), seed=1, **kwargs)
    fm.build((None, HEAD_DIM))
    return fm


def make_qkv(length, key_length=None, *, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    key_length = key_length or length
    query = scale * rng.standard_normal((BATCH, length, HEADS, HEAD_DIM))
    key = scale * rng.standard_normal((BATCH, key_length, KEY_HEADS, HEAD_DIM))
    value = rng.standard_normal((BATCH, key_length, KEY_HEADS, VALUE_DIM))
    return tuple(x.astype("float32") for x in (query, key, value))


def make_state(seed=8):
    rng = np.random.default_rng(seed)
    shape = (BATCH, KEY_HEADS, FEATURES)
    state = {
        "kv": rng.standard_normal((*shape, VALUE_DIM)),
        "k_sum": rng.random(shape) + 0.5,
        "log_max": rng.standard_normal(shape),
    }
    return {name: x.astype("float32") for name, x in state.items()}


def make_direction(length):
    rng = np.random.default_rng(5)
    return rng.standard_normal((BATCH, length, HEADS, VALUE_DIM)).astype("float32")


def oracle(query, key, value, fm, **options):
    key, value = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (key, value))
    projection = to_numpy(fm.projection)
    logs = (oracles.favor_log_features(x, projection) for x in (query, key))
    return oracles.kernel_attention_loop(*logs, value.astype("float64"), **options)


# Against the reference.


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_states_and_every_gradient_equal_the_reference(causal, length):
    """With a mask per head, a state in and out, and more queries than keys if they may be."""
    query, key, value = make_qkv(length if causal else length + CHUNK, length)
    mask = np.random.default_rng(2).random((BATCH, KEY_HEADS, length)) > 0.3
    fm, state, direction = feature_map(), make_state(), make_direction(query.shape[1])
    projection = to_numpy(fm.projection)

    def run(implementation):
        def loss(direction, kv_direction, k_direction, query, key, value, projection, kv, k_sum):
            with keras.StatelessScope(state_mapping=[(fm.projection, projection)]):
                output, last = favor_attention(
                    query,
                    key,
                    value,
                    fm,
                    causal=causal,
                    key_mask=mask,
                    initial_state={"kv": kv, "k_sum": k_sum, "log_max": state["log_max"]},
                    return_state=True,
                    implementation=implementation,
                )
            # The sums that the state stands for, relative to a fixed scale.
            factor = ops.exp(ops.stop_gradient(last["log_max"]) - 2.0)
            kv = ops.expand_dims(factor, -1) * last["kv"]
            return (
                ops.sum(ops.multiply(output, direction))
                + ops.sum(ops.multiply(kv, kv_direction))
                + ops.sum(ops.multiply(factor * last["k_sum"], k_direction))
            )

        # The gradients by the directions are the output and the sums.
        directions = (direction, *(make_state(seed=9)[name] for name in ("kv", "k_sum")))
        arrays = (query, key, value, projection, state["kv"], state["k_sum"])
        return gradients(loss, *directions, *arrays)[1]

    actual, expected = run(NAME), run("reference")
    assert_close(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert np.abs(e).max() > 1e-3
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * np.abs(e).max())


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", *slow_where_interpreted("float16")])
def test_16_bit_tensors_equal_the_reference(causal, dtype):
    arrays, fm = make_qkv(WIDE_CHUNK + 13), feature_map()
    direction = make_direction(WIDE_CHUNK + 13)
    # Both see the same rounded inputs.
    arrays = [to_numpy(ops.cast(ops.cast(x, dtype), "float32")) for x in (*arrays, direction)]
    *arrays, direction = arrays

    def run(implementation, dtype):
        def loss(direction, *arrays):
            cast = [ops.cast(x, dtype) for x in arrays]
            output = favor_attention(*cast, fm, causal=causal, implementation=implementation)
            assert keras.backend.standardize_dtype(output.dtype) == dtype
            return ops.sum(ops.multiply(ops.cast(output, "float32"), direction))

        return gradients(loss, direction, *arrays)[1]

    actual, expected = run(NAME, dtype), run("reference", "float32")
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, dtype)


@needs_kernels
def test_16_bit_tensors_reach_the_kernels_as_they_are(monkeypatch):
    def show(self, *tensors, **options):
        raise RuntimeError(" ".join(keras.backend.standardize_dtype(x.dtype) for x in tensors[:3]))

    monkeypatch.setattr(_fused.Fused, "attend", show)
    query, key, value = (ops.cast(x, "bfloat16") for x in make_qkv(9))
    with pytest.raises(RuntimeError, match="bfloat16 bfloat16 bfloat16"):
        favor_attention(query, key, value, feature_map(), implementation=NAME)


@needs_kernels
@pytest.mark.parametrize(
    "options", [{"hyperbolic": True, "num_features": 38}, *slow_on_jax({"num_features": 1})]
)
def test_other_feature_counts_equal_the_reference(options):
    arrays, fm = make_qkv(CHUNK + 1), feature_map(**options)
    direction = make_direction(CHUNK + 1)
    call = {"causal": True}
    expected = attention_gradients(*arrays, fm, direction, implementation="reference", **call)
    actual = attention_gradients(*arrays, fm, direction, implementation=NAME, **call)
    assert_close(actual[0], expected[0])
    assert_gradients_close(actual[1], expected[1])


@needs_kernels
@pytest.mark.parametrize("causal", CAUSAL_FIRST)
def test_sizes_that_need_no_padding_equal_the_reference(causal):
    """Then nothing is copied, and with one head tensors keep the strides of their callers."""
    rng = np.random.default_rng(6)
    shape = (1, 2 * CHUNK, 1, 16)
    *arrays, direction = (rng.standard_normal(shape).astype("float32") for _ in range(4))
    # (B, T, N, H) as the view of a tensor with the length last.
    arrays = [
        ops.transpose(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), (0, 3, 1, 2)) for x in arrays
    ]
    fm = FavorPlus(32, seed=1)
    call = {"causal": causal}
    expected = attention_gradients(*arrays, fm, direction, implementation="reference", **call)
    actual = attention_gradients(*arrays, fm, direction, implementation=NAME, **call)
    assert_close(actual[0], expected[0])
    assert_gradients_close(actual[1], expected[1])


# Norms.


@needs_kernels
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loud", ["first", *slow_on_jax("all but the first")])
def test_mixed_norms_in_one_chunk_equal_a_float64_loop(causal, loud):
    """Guards against one scale for a chunk, under which quiet rows underflow."""
    query, key, value = make_qkv(13)
    part = slice(0, 1) if loud == "first" else slice(1, None)
    query[:, part] *= 8
    key[:, part] *= 8
    fm = feature_map()
    output = to_numpy(attend(query, key, value, fm, causal=causal, implementation=NAME))
    # Scores of hundreds round to 1e-5 in float32, whichever way they are formed.
    assert relative_rms(output, oracle(query, key, value, fm, causal=causal)) < 1e-4
    if causal:
        assert_close(output[:, 0], np.repeat(value[:, 0], HEADS // KEY_HEADS, axis=1))


@needs_kernels
@pytest.mark.parametrize("causal", CAUSAL_FIRST)
def test_huge_norms_give_finite_averages_and_gradients(causal):
    arrays, fm = make_qkv(CHUNK + 9, scale=1000.0), feature_map()
    direction = make_direction(CHUNK + 9)
    output, grads = attention_gradients(*arrays, fm, direction, causal=causal, implementation=NAME)
    assert np.abs(output).max() <= np.abs(arrays[2]).max() * 1.01
    assert np.abs(output).max() > 0.1
    assert all(np.isfinite(g).all() for g in grads)
    # Values far below the largest weight get none; those that count get theirs.
    assert np.abs(grads[2]).max() > 0.1


@needs_kernels
def test_later_keys_of_any_norm_change_nothing():
    place, length = CHUNK + 5, 2 * CHUNK + 3
    before, later = make_qkv(length), make_qkv(length, seed=9, scale=8.0)
    after = [
        np.concatenate([x[:, :place], y[:, place:]], 1) for x, y in zip(before, later, strict=True)
    ]
    fm = feature_map()
    one, other = (
        to_numpy(attend(*x, fm, causal=True, implementation=NAME))[:, :place]
        for x in (before, after)
    )
    assert_close(one, other)


# Masks and states.


@needs_kernels
@pytest.mark.parametrize("causal", CAUSAL_FIRST)
def test_masked_keys_and_rows_without_a_key(causal):
    arrays, fm = make_qkv(CHUNK + 7), feature_map()
    mask = np.ones((BATCH, CHUNK + 7), bool)
    mask[0], mask[1, :5] = False, False
    for x in arrays[1:]:
        x[~mask] = np.nan
    direction = make_direction(CHUNK + 7)
    options = {"causal": causal, "key_mask": mask}
    output, grads = attention_gradients(*arrays, fm, direction, implementation=NAME, **options)
    assert (output[0] == 0).all()
    assert (output[1, :5] == 0).all() == causal
    assert (np.abs(output[1, 5:]).sum(axis=-1) > 0).all()
    assert (grads[0][0] == 0).all()
    assert np.isfinite(grads[0]).all()
    for grad in grads[1:]:
        assert (grad[~mask] == 0).all()
        assert (np.abs(grad[mask]).sum(axis=-1) > 0).all()


@needs_kernels
def test_states_pass_between_calls_and_implementations():
    length, split = 2 * CHUNK + 3, CHUNK + 5
    arrays, fm = make_qkv(length), feature_map()
    options = {"causal": True, "return_state": True}
    expected, last = attend(*arrays, fm, implementation="reference", **options)
    head, tail = ([x[:, part] for x in arrays] for part in (slice(split), slice(split, None)))
    for first, second in ((NAME, "chunked"), ("chunked", NAME)):
        start, state = attend(*head, fm, implementation=first, **options)
        rest, state = attend(*tail, fm, initial_state=state, implementation=second, **options)
        assert_close(np.concatenate([to_numpy(start), to_numpy(rest)], axis=1), expected)
        assert_states_close(state, last)


# When they apply.


def why_not(name, query, feature_map, *, exact_window=None, segmented=False):
    options = {"exact_window": exact_window, "segmented": segmented}
    return FUSED[name].why_not((query,) * 3, feature_map, stateful=False, **options)


@needs_kernels
def test_they_say_what_they_cannot_do():
    query = ops.convert_to_tensor(make_qkv(9)[0])
    fm = feature_map()
    assert why_not(NAME, query, fm) is None
    assert "neither an exact near field" in why_not(NAME, query, fm, exact_window=4)
    assert "nor segments" in why_not(NAME, query, fm, segmented=True)
    for other in (ReLU(FEATURES), FavorPlusPlus(FEATURES), FavorPlus(legacy_epsilon=1e-6)):
        assert "knows the features of FavorPlus" in why_not(NAME, query, other)
    wide = SimpleNamespace(dtype="float64", shape=(2, 9, 2, 7), device=getattr(query, "device", 0))
    assert "accumulates in float32" in why_not(NAME, wide, fm)
    wide.dtype, wide.shape = "float32", (2, None, 2, 7)
    assert "static shapes" in why_not(NAME, wide, fm)
    wide.shape = (2, 9, 2, 129)
    assert "at most 128" in why_not(NAME, wide, fm)
    with pytest.raises(NotImplementedError, match="neither an exact near field"):
        favor_attention(query, query, query, fm, exact_window=4, implementation=NAME)


@pytest.mark.parametrize("name", sorted(FUSED))
def test_they_run_on_their_backend_only(name):
    if name == NAME:
        pytest.skip("this is its backend")
    x = make_qkv(9)[0]
    with pytest.raises(NotImplementedError, match=f"{name!r} runs on the {FUSED[name].backend}"):
        favor_attention(x, x, x, feature_map(), implementation=name)


@needs_kernels
def test_they_are_taken_by_name_only(monkeypatch):
    query, key, value = make_qkv(9)

    def fail(*arguments, **options):
        raise AssertionError("the kernels were called")

    monkeypatch.setattr(_fused.Fused, "attend", fail)
    attend(query, key, value, feature_map())
    with pytest.raises(AssertionError, match="the kernels were called"):
        attend(query, key, value, feature_map(), implementation=NAME)


@pytest.mark.skipif(NAME != "pallas", reason="about JAX")
def test_pallas_is_for_gpus_that_can(monkeypatch):
    import jax

    query, fm = ops.convert_to_tensor(make_qkv(9)[0]), feature_map()

    def on(capability):
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        return why_not(NAME, query, fm)

    assert on("8.0") is None and on("12.0") is None
    assert "compute capability 8.0" in on("7.5")
    assert "compute capability 8.0" in on("gfx942")
    monkeypatch.setattr(keras.distribution, "distribution", lambda: "data parallel")
    assert "keras.distribution" in on("9.0")


@pytest.mark.skipif(NAME != "triton", reason="about PyTorch")
@needs_kernels
def test_triton_is_for_gpus_that_can(monkeypatch):
    import torch

    on_gpu = SimpleNamespace(
        dtype="bfloat16", shape=(2, 9, 2, 7), device=SimpleNamespace(type="cuda")
    )
    fm, kernels = feature_map(), _fused.TRITON._kernels()

    def on(capability, cuda="12.9"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return why_not(NAME, on_gpu, fm)

    monkeypatch.setattr(kernels, "INTERPRETED", True)
    assert on((7, 5)) is None
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert on((8, 0)) is None and on((12, 0)) is None
    assert "compute capability 8.0" in on((7, 5))
    assert "compute capability 8.0" in on((9, 4), cuda=None)
    assert "set TRITON_INTERPRET=1" in why_not(NAME, ops.ones((1, 2, 3, 4)), fm)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs the package triton" in on((9, 0))
