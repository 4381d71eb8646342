"""The op: its contract, its checks, and the choice of an implementation."""

import numbers
from typing import Any

from keras import ops
from keras.utils import is_keras_tensor

from keras_performer.ops import _blocked, _chunked, _fused, _near_field, _reference, _windowed
from keras_performer.ops._chunks import LOG_ZERO, dtype_of, run_indices
from keras_performer.ops._inputs import (
    build_map,
    by_key_heads,
    check_key_mask,
    check_segment_ids,
    check_shapes,
    differ,
    fits,
    group_queries,
    ungroup,
    wide_dtype,
    without_autocast,
)

FUSED = {"triton": _fused.TRITON, "pallas": _fused.PALLAS}
"""Kernels for GPUs, one for each backend that has a language for them. They are taken by name only,
until somebody has measured them on a GPU."""
IMPLEMENTATIONS = {
    "chunked": _chunked,
    "blocked": _blocked,
    "windowed": _windowed,
    "reference": _reference,
}
"""Those in `keras.ops`, by name, in the order of preference of `implementation="auto"`."""


@without_autocast
def favor_attention(
    query: Any,
    key: Any,
    value: Any,
    feature_map: Any,
    *,
    causal: bool = False,
    key_mask: Any = None,
    segment_ids: Any = None,
    exact_window: int | None = None,
    num_sink_tokens: int = 0,
    far_bias: Any = None,
    initial_state: dict[str, Any] | None = None,
    return_state: bool = False,
    implementation: str = "auto",
) -> Any:
    """Attention through features, at a cost linear in length.

    `out_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)`, the sums running over the keys
    that query t may see. With `FavorPlus`, phi(q).phi(k) is an unbiased estimate of
    exp(q.k / sqrt(H)), so the result estimates softmax attention. Use it directly for custom
    layers; `PerformerAttention` wraps it for models.

    **Shapes** B batch, T query length, S key length, N query heads, K key/value heads (K divides
    N; head n reads key/value head n // (N/K)), H head size, V value head size, M features.

    **Args**
        query: (B, T, N, H), floating point, not scaled.
        key: (B, S, K, H).
        value: (B, S, K, V).
        feature_map: A `keras_performer.feature_maps.FeatureMap`. It is built for head size H if it
            is not yet.
        causal: Whether query t sees only keys 0 to t. Needs T = S.
        key_mask: None, or (B, S) or per head (B, K, S), True or nonzero where the key takes part.
        segment_ids: None, or integers (B, T) for packed sequences; needs T = S. A segment is a run
            of equal ids, and tokens attend within their run.
        exact_window: W, to weigh near keys by exp(q.k / sqrt(H)) itself and only the others
            through features, in one sum. Blocks of W tokens see themselves and the block on either
            side exactly, or causally the one before. The grid of blocks starts at the first
            unmasked token of each row and each segment. Needs T = S, queries and keys of the same
            positions, and a map that estimates that kernel. With W >= T this is softmax attention.
            None or 0 is pure feature attention.
        num_sink_tokens: s, to weigh the first s keys of each sequence exactly for every query. It
            needs an `exact_window`.
        far_bias: None, or (K,), what to add to q.k / sqrt(H) of pairs that are not weighed exactly:
            these then weigh exp(far_bias) times as much. It needs an `exact_window`.
        initial_state: A state returned earlier. Causal: the sequence goes on after it.
            Bidirectional: every query also sees the keys in it, through features.
        return_state: Whether to return the state after all keys as well.
        implementation: "auto"; "chunked", of linear time and memory; with an exact window
            "blocked", for whole sequences, or "windowed", for segments and states too; "reference"
            (the definition, quadratic); or the fused kernels "triton" (PyTorch) and "pallas" (JAX)
            for NVIDIA GPUs, of `FavorPlus` without window and segments. These were run in
            interpreters only so far, so "auto" does not take them.

    **Returns** The output (B, T, N, V) of the type of `query`; with `return_state=True` a pair of
    it and the state: a dictionary of `kv` (B, K, M, V), `k_sum` (B, K, M) and `log_max` (B, K, M),
    which stand for the sums `exp(log_max) * kv` and `exp(log_max) * k_sum` over keys, and with
    `segment_ids` also `segment_id` (B,), the segment that they belong to. Causal with an exact
    window it also holds `window_position` (B,), the number of tokens seen of the last segment, and
    the keys that the next token sees exactly, which the sums leave out: `window_key` (B, K, 2W, H),
    `window_value` (B, K, 2W, V), `window_mask` (B, K, 2W), and `sink_key`, `sink_value` and
    `sink_mask` of s slots. Bidirectionally the sums are of all keys. Its size does not depend on S.

    **Masking** A masked key leaves the numerator and the denominator; what it holds, NaN included,
    does not matter. A query that sees no key gives zeros. The state skips masked keys, and with
    `segment_ids` their ids: masked tokens are of the segment before them. With an exact window and
    a state, masked keys at the end of a call are padding: the next call's first token follows the
    last unmasked one. What masked queries before the first and after the last
    unmasked key of a row give then is finite, and not specified.

    **Precision** Features, sums and quotients are float32 whatever the input type, float64 for
    float64 (on PyTorch as accurate as float32, in which Keras computes some of them there). No
    epsilon is added; the features of one token span 70 nats, and smaller ones are held there, which
    changes results only beyond six to ten times the norms of unit Gaussian vectors of 64 numbers.
    The gradient treats `log_max` as a constant, so differentiate functions of `exp(log_max) * kv`,
    which do not depend on it. Of 16-bit tensors the fused kernels round the factors of products to
    ten bits of mantissa. On TPUs and recent GPUs JAX and TensorFlow do so to float32 too, as
    everywhere in a model, unless
    `jax.config.update("jax_default_matmul_precision", "highest")` or
    `tf.config.experimental.enable_tensor_float_32_execution(False)` says otherwise. Within
    `torch.autocast` attention computes as outside of it. The gradients of the fused kernels cannot
    be differentiated again.

    **Cost** O(T N M (H + V)) time; causal and packed attention add O(T C N (M + V)) for chunks of C
    tokens, and a window of W tokens O(T N C (H + V + M)) for C = max(128, 2 W) + 4 W (causal at
    most 128 + 2 W).
    Memory O(T N (H + V) + (T / C) K M V); the backward pass recomputes features and scores, on
    TensorFlow within a `tf.function` only, on PyTorch where keeping them would take more than some
    200 MiB, and not for a second derivative.

    **Raises** ValueError or TypeError for shapes, types and combinations that cannot work;
    NotImplementedError where the `implementation` that is named cannot do what is asked.

    **Example**

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype("float32")
    >>> out = favor_attention(x, x, x, keras_performer.feature_maps.FavorPlus(seed=1), causal=True)
    >>> tuple(out.shape)
    (1, 5, 2, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, section 2. We differ in keeping each
    token's scale beside its features instead of adding an epsilon to features divided by a global
    maximum, and in walking causally over chunks instead of tokens.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if is_keras_tensor(tensor):
            raise TypeError(
                "favor_attention works on tensors, not on symbolic inputs. In a functional model "
                f"use keras_performer.layers.PerformerAttention. Received: {name}={tensor}"
            )
    query, key, value = (ops.convert_to_tensor(t) for t in (query, key, value))
    check_shapes(query, key, value, causal, segment_ids is not None)
    segment_ids = check_segment_ids(segment_ids, query)
    _check_feature_map(feature_map)
    exact_window = _check_window(exact_window, num_sink_tokens, feature_map, query, key)
    far_bias = _check_far_bias(far_bias, exact_window, key)
    chosen = _choose(
        implementation,
        (query, key, value),
        feature_map,
        exact_window=exact_window,
        segmented=segment_ids is not None,
        stateful=initial_state is not None or return_state,
    )
    build_map(feature_map, key)
    output_dtype = dtype_of(query)
    dtype = wide_dtype(query)
    if chosen not in FUSED:  # whose kernels widen what they read on chip
        query, key, value = (ops.cast(t, dtype) for t in (query, key, value))
    key_mask = check_key_mask(key_mask, key)
    length, num_key_heads = query.shape[1], key.shape[2]
    query = group_queries(query, num_key_heads)
    key, value = (by_key_heads(t, key_mask) for t in (key, value))
    runs = None
    if segment_ids is not None:
        if not causal and (initial_state is not None or return_state):
            raise ValueError(
                "Bidirectional attention within segment_ids has no single state. Use causal=True, "
                "or call favor_attention once for each segment."
            )
        if key_mask is not None and (initial_state is not None or return_state):
            segment_ids = _without_padding(segment_ids, key_mask, initial_state)
        runs = _run_indices(segment_ids, initial_state)
    if (initial_state is not None or return_state) and not feature_map.supports_state:
        raise ValueError(
            f"{type(feature_map).__name__} scales its features by a maximum over the whole "
            "sequence, so it has no state. Use it without initial_state and return_state, or set "
            "legacy_epsilon=None."
        )
    if initial_state is not None:
        sizes = (key.shape[0], num_key_heads, feature_map.feature_dim, key.shape[3], value.shape[3])
        window = (exact_window, num_sink_tokens) if exact_window else None
        initial_state = _check_state(initial_state, sizes, window, causal, dtype)
    operands = feature_map.operands(key, key_mask)
    feature_map, operands = _near_field.with_bias(feature_map, operands, far_bias, dtype)
    arguments = (query, key, value, feature_map, operands)
    options = {"causal": causal, "key_mask": key_mask, "runs": runs, "state": initial_state}
    attend = {**FUSED, **IMPLEMENTATIONS}[chosen].attend
    if exact_window:
        output, state = _attend_with_window(
            attend, *arguments, **options, window=(exact_window, num_sink_tokens, return_state)
        )
        short = isinstance(length, int) and length <= 2 * exact_window
        if far_bias is not None and short and initial_state is None:
            # Perhaps nothing was far. Trainers warn of weights that have no gradient at all.
            output = output + 0.0 * ops.cast(ops.sum(far_bias), dtype_of(output))
    else:
        output, state = attend(*arguments, **options)
    output = ops.cast(ungroup(output), output_dtype)
    if not return_state:
        return output
    if dtype == "float64":  # which Keras promotes to float32 on PyTorch here and there
        state |= {name: ops.cast(state[name], dtype) for name in ("kv", "k_sum", "log_max")}
    if segment_ids is not None:
        state["segment_id"] = segment_ids[:, -1]
    return output, state


def _attend_with_window(
    attend, query, key, value, feature_map, operands, *, causal, key_mask, runs, state, window
) -> tuple[Any, dict[str, Any]]:
    exact_window, num_sinks, return_state = window

    def begin(state, return_state):
        sizes = {"window": exact_window, "num_sinks": num_sinks, "return_state": return_state}
        return _near_field.begin(key, value, key_mask, runs, state, **sizes)

    def absorb(keys, state):
        key, value, mask = keys
        options = {"causal": False, "key_mask": mask, "runs": None, "state": state}
        one_query = query[:, :, :1, :1]
        return _chunked.attend(one_query, key, value, feature_map, operands, **options)[1]

    if causal:
        near, keys, values, mask, runs = begin(state, return_state)
        options = {"causal": True, "key_mask": mask, "runs": runs, "state": state, "near": near}
        output, sums = attend(query, keys, values, feature_map, operands, **options)
        if return_state:
            sums = {**sums, **_near_field.finish(near, keys, values, mask)}
        return output, sums
    kept: dict[str, Any] = {}
    if state is not None and "window_key" in state:
        # To tokens of other positions all its keys are far.
        kept = {n: state[n] if n == "window_position" else ops.zeros_like(state[n]) for n in state}
        state = absorb(_near_field.remembered(state, exact_window), state)
    near, keys, values, mask, runs = begin(None, False)
    options = {"causal": False, "key_mask": mask, "runs": runs, "state": state, "near": near}
    output, sums = attend(query, keys, values, feature_map, operands, **options)
    if return_state:
        sums = {**kept, **absorb((key, value, key_mask), state)}
    return output, sums


def empty_favor_state(
    feature_map: Any,
    batch_size: Any,
    num_key_heads: int,
    value_dim: int,
    dtype: str = "float32",
    exact_window: int | None = None,
    num_sink_tokens: int = 0,
) -> dict[str, Any]:
    """The state of `favor_attention` before the first key.

    Passing it is passing no state; loops that carry a state start from it. With `segment_ids` they
    start from None: this state is of no segment.

    **Args**
        feature_map: A built feature map with M features.
        batch_size: B.
        num_key_heads: K.
        value_dim: V.
        dtype: "float32" or "float64".
        exact_window: That of the calls to come.
        num_sink_tokens: That of the calls to come.

    **Returns** A dictionary of `kv` (B, K, M, V), `k_sum` (B, K, M) and `log_max` (B, K, M), and
    with an exact window of what `favor_attention` adds to them.

    **Example**

    >>> feature_map = keras_performer.feature_maps.FavorPlus(16, seed=1)
    >>> feature_map.build((None, 8))
    >>> tuple(empty_favor_state(feature_map, 1, 2, 8)["kv"].shape)
    (1, 2, 16, 8)
    """
    if not feature_map.built:
        raise ValueError(
            "A state has as many features as the map: first call its `build` with a shape whose "
            f"last axis is the head size. Received: feature_map={feature_map!r}, not built"
        )
    heads = (batch_size, num_key_heads)
    sizes = (*heads, feature_map.feature_dim, feature_map.head_dim, value_dim)
    shapes = _state_shapes(sizes, (exact_window, num_sink_tokens) if exact_window else None)
    state = {
        name: ops.zeros(shape, _STATE_TYPES.get(name, dtype)) for name, shape in shapes.items()
    }
    if feature_map.log_space:
        state["log_max"] = state["log_max"] + LOG_ZERO
    return state


def favor_attention_weights(
    query: Any,
    key: Any,
    feature_map: Any,
    *,
    causal: bool = False,
    key_mask: Any = None,
    segment_ids: Any = None,
    exact_window: int | None = None,
    num_sink_tokens: int = 0,
    far_bias: Any = None,
) -> Any:
    """The normalised weights that `favor_attention` gives each key, to look at short inputs.

    **Shapes and args** as in `favor_attention`.

    **Returns** (B, N, T, S), of the type of `query`. Every row sums to one, or to zero where the
    query sees no key.

    **Cost** O(T S N M) time and memory: this forms what linear attention avoids.

    **Raises** as `favor_attention` does.

    **Example**

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype("float32")
    >>> feature_map = keras_performer.feature_maps.FavorPlus(seed=1)
    >>> tuple(favor_attention_weights(x, x, feature_map).shape)
    (1, 2, 5, 5)
    """
    query, key = ops.convert_to_tensor(query), ops.convert_to_tensor(key)
    check_shapes(query, key, key, causal, segment_ids is not None)
    segment_ids = check_segment_ids(segment_ids, query)
    _check_feature_map(feature_map)
    exact_window = _check_window(exact_window, num_sink_tokens, feature_map, query, key)
    far_bias = _check_far_bias(far_bias, exact_window, key)
    build_map(feature_map, key)
    output_dtype = dtype_of(query)
    dtype = wide_dtype(query)
    batch, length, num_heads, _ = ops.shape(query)
    num_keys, num_key_heads = ops.shape(key)[1:3]
    key_mask = check_key_mask(key_mask, key)
    query = group_queries(ops.cast(query, dtype), num_key_heads)
    key = by_key_heads(ops.cast(key, dtype), key_mask)
    runs = None if segment_ids is None else _run_indices(segment_ids, None)
    near = None
    if exact_window:
        sizes = {"window": exact_window, "num_sinks": num_sink_tokens, "return_state": False}
        near = _near_field.begin(key, key, key_mask, runs, None, **sizes)[0]
    operands = feature_map.operands(key, key_mask)
    feature_map, operands = _near_field.with_bias(feature_map, operands, far_bias, dtype)
    weights = _reference.attention_weights(
        query,
        key,
        feature_map,
        operands,
        causal=causal,
        key_mask=key_mask,
        runs=runs,
        near=near,
    )
    weights = ops.reshape(weights, (batch, num_heads, length, num_keys))
    return ops.cast(weights, output_dtype)


def _check_feature_map(feature_map: Any) -> None:
    if not callable(getattr(feature_map, "features", None)):
        raise TypeError(
            "feature_map must be a keras_performer.feature_maps.FeatureMap, such as FavorPlus(). "
            f"Received: feature_map={feature_map!r}"
        )


def _choose(implementation: str, tensors: tuple[Any, ...], feature_map: Any, **kind: Any) -> str:
    if implementation == "auto":  # "reference" refuses nothing
        return next(n for n, module in IMPLEMENTATIONS.items() if module.why_not(**kind) is None)
    if implementation in FUSED:
        refusal = FUSED[implementation].why_not(tensors, feature_map, **kind)
    elif implementation in IMPLEMENTATIONS:
        refusal = IMPLEMENTATIONS[implementation].why_not(**kind)
    else:
        raise ValueError(
            f"implementation must be 'auto' or one of {sorted([*FUSED, *IMPLEMENTATIONS])}. "
            f"Received: implementation={implementation!r}"
        )
    if refusal is not None:
        raise NotImplementedError(refusal)
    return implementation


def _run_indices(segment_ids: Any, initial_state: dict[str, Any] | None) -> Any:
    """Number the runs of equal ids; a run that continues the state's segment has number zero."""
    first = None
    if initial_state is not None:
        if "segment_id" not in initial_state:
            raise ValueError(
                "With segment_ids the initial_state must say which segment it belongs to: pass a "
                "state that was returned by a call with segment_ids. Received: initial_state with "
                f"keys {sorted(initial_state)}"
            )
        first = ops.expand_dims(initial_state["segment_id"], -1)
    return run_indices(segment_ids, first)


def _without_padding(segment_ids: Any, key_mask: Any, initial_state: dict[str, Any] | None) -> Any:
    """Give masked tokens the id of the last unmasked one before them, or of what comes first."""
    mask = ops.any(key_mask, axis=1)
    index = ops.arange(ops.shape(mask)[1], dtype="int32")
    # The slots of the unmasked tokens in their order, and then the others.
    order = ops.argsort(ops.where(mask, index, index + ops.shape(mask)[1]), axis=1)
    count = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    latest = ops.take_along_axis(order, ops.maximum(count - 1, 0), axis=1)
    filled = ops.take_along_axis(segment_ids, latest, axis=1)
    if initial_state is None or "segment_id" not in initial_state:
        return filled
    before = ops.cast(ops.expand_dims(initial_state["segment_id"], -1), dtype_of(segment_ids))
    return ops.where(count > 0, filled, before)


def _check_window(
    exact_window: int | None, num_sink_tokens: int, feature_map: Any, query: Any, key: Any
) -> int | None:
    for name, count in (("exact_window", exact_window or 0), ("num_sink_tokens", num_sink_tokens)):
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
            raise ValueError(f"{name} must be an integer of at least 0. Received: {name}={count!r}")
    if not exact_window:
        if num_sink_tokens:
            raise ValueError(
                "num_sink_tokens needs an exact_window, beside which the first keys are exact too: "
                f"set one. Received: num_sink_tokens={num_sink_tokens}, exact_window={exact_window}"
            )
        return None
    if not (feature_map.estimates_softmax and feature_map.log_space):
        raise ValueError(
            "exact_window adds exp(q.k) of near keys to estimates of it for the others, and "
            f"{type(feature_map).__name__} estimates another kernel: use FavorPlus(), or "
            f"exact_window=None. Received: exact_window={exact_window}"
        )
    if differ(query.shape[1], key.shape[1]):
        raise ValueError(
            "exact_window needs queries and keys of the same positions, of one length (axis 1): in "
            "cross-attention no key is near. Received: "
            f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
        )
    return int(exact_window)


def _check_far_bias(far_bias: Any, exact_window: int | None, key: Any) -> Any:
    if far_bias is None:
        return None
    if not exact_window:
        raise ValueError(
            "far_bias weighs what lies beyond an exact window, and without one it would cancel: "
            "set exact_window, or far_bias=None. Received: exact_window=None"
        )
    far_bias = ops.convert_to_tensor(far_bias)
    if tuple(far_bias.shape) != (key.shape[2],):
        raise ValueError(
            f"far_bias must have one number for each of the {key.shape[2]} key heads. "
            f"Received: far_bias of shape {tuple(far_bias.shape)}"
        )
    return far_bias


_STATE_TYPES = {"window_position": "int32", "window_mask": "bool", "sink_mask": "bool"}
"""The types of what a state holds, where they are not that of its sums."""


def _state_shapes(sizes: tuple[Any, ...], window: tuple[int, int] | None) -> dict[str, Any]:
    """The shapes in a state; `sizes` are B, K, M, H, V, and `window` is W and s."""
    *heads, num_features, head_dim, value_dim = sizes
    sums = (*heads, num_features)
    shapes = {"kv": (*sums, value_dim), "k_sum": sums, "log_max": sums}
    if window is None:
        return shapes
    shapes["window_position"] = (heads[0],)
    for name, count in (("window", 2 * window[0]), ("sink", window[1])):
        if count:
            shapes[f"{name}_key"] = (*heads, count, head_dim)
            shapes[f"{name}_value"] = (*heads, count, value_dim)
            shapes[f"{name}_mask"] = (*heads, count)
    return shapes


def _check_state(
    state: dict[str, Any],
    sizes: tuple[Any, ...],
    window: tuple[int, int] | None,
    causal: bool,
    dtype: str,
) -> dict[str, Any]:
    """Cast the tensors of a state; `sizes` are B, K, M, H, V, and `window` is W and s."""
    if window is None and isinstance(state, dict) and "window_key" in state:
        raise ValueError(
            "initial_state comes from a call with an exact window, whose keys its sums leave out: "
            "pass the same exact_window. Received: exact_window=None"
        )
    if "sink_key" in state and not (window and window[1]):
        raise ValueError(
            "initial_state comes from a call with num_sink_tokens, whose keys its sums leave out: "
            "pass the same number. Received: num_sink_tokens=0"
        )
    has_window = causal or "window_key" in state
    expected = _state_shapes(sizes, window if has_window else None)
    if not isinstance(state, dict) or not set(expected) <= set(state):
        raise ValueError(
            f"initial_state must be a state that favor_attention returned, with {sorted(expected)}."
            f" Received: initial_state={state!r}"
        )
    tensors = {
        name: ops.cast(ops.convert_to_tensor(state[name]), _STATE_TYPES.get(name, dtype))
        for name in expected
    }
    for name, tensor in tensors.items():
        if not fits(tensor.shape, expected[name]):
            raise ValueError(
                f"initial_state[{name!r}] must have the shape {expected[name]}, which follows from "
                "batch, key heads, features, value size and window. "
                f"Received: shape {tuple(tensor.shape)}"
            )
    return tensors
