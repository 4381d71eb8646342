"""Exact softmax attention: the baseline that feature attention is measured by."""

import functools
from typing import Any

from keras import ops

from keras_performer.ops._chunks import dtype_of, run_indices, same_run
from keras_performer.ops._inputs import (
    check_key_mask,
    check_segment_ids,
    check_shapes,
    fits,
    wide_dtype,
)
from keras_performer.ops.sliding_window_attention import sliding_window_attention


def softmax_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    sliding_window: int | None = None,
    causal: bool = False,
    key_mask: Any = None,
    segment_ids: Any = None,
    initial_state: dict[str, Any] | None = None,
    return_state: bool = False,
) -> Any:
    """Softmax attention with the masks and the state of `favor_attention`.

    It is the baseline of the models in this package. Without a window it is the backend's own
    attention, and its cost is quadratic.

    **Shapes and args** query (B, T, N, H), key (B, S, K, H), value (B, S, K, V); K divides N.
    `key_mask` is boolean (B, S) or (B, K, S). `segment_ids` are integers (B, T) with T = S.
    `sliding_window` restricts query t to keys s with |t - s| < sliding_window. `initial_state`,
    from `empty_softmax_state` or an earlier call, holds the L keys before these: a causal sequence
    goes on after them, and otherwise every query sees them as well.

    **Returns** (B, T, N, V), of the type of `query`; with `return_state=True` a pair of it and the
    state, a dictionary of `key` (B, L, K, H), `value` (B, L, K, V) and `key_mask` (B, L): the last
    L keys up to each row's last unmasked one, where L is that of `initial_state`. What no longer
    fits is forgotten.

    **Masking** A query that sees no key gives zeros. Masked keys at the end of a call with a state
    are padding: the next call's keys follow the last unmasked one.

    **Precision** That of `keras.ops.dot_product_attention` in the type of `query`; float32 with a
    window.

    **Cost** O(T S N (H + V)) time; with a window W, O(T N W (H + V)).

    **Raises** ValueError or TypeError for shapes and types that cannot work; ValueError for a state
    together with `segment_ids` or a mask per head, and for `return_state` without `initial_state`,
    whose capacity is not known then.

    **Example**

    >>> x = np.ones((1, 5, 2, 8), "float32")
    >>> tuple(softmax_attention(x, x, x, causal=True).shape)
    (1, 5, 2, 8)

    **Source** Vaswani et al. 2017, arXiv 1706.03762, section 3.2.
    """
    query, key, value = (ops.convert_to_tensor(t) for t in (query, key, value))
    check_shapes(query, key, value, causal, segment_ids is not None)
    key_mask = check_key_mask(key_mask, key)
    key, value = _drop(key, key_mask), _drop(value, key_mask)
    masks = {"key_mask": key_mask, "segment_ids": segment_ids}
    if initial_state is None:
        if return_state:
            raise ValueError(
                "return_state=True needs the initial_state whose capacity the new state keeps: "
                "pass `empty_softmax_state(...)`. Received: initial_state=None"
            )
        if sliding_window is not None:
            return sliding_window_attention(
                query, key, value, sliding_window, causal=causal, **masks
            )
        if key_mask is None and segment_ids is None:
            return _dense(query, key, value, None, causal)
        return _dense(query, key, value, _visible(query, key, causal, None, **masks))

    if segment_ids is not None or (key_mask is not None and key_mask.shape[1] != 1):
        raise ValueError(
            "Softmax attention with a state takes a key_mask (batch, length) and no segment_ids. "
            f"Received: {', '.join(name for name, mask in masks.items() if mask is not None)}"
        )
    _check_state(initial_state, key, value)
    capacity, length = ops.shape(initial_state["key"])[1], query.shape[1]
    key_mask = ops.ones(ops.shape(key)[:2], "bool") if key_mask is None else key_mask[:, 0]
    keys, values, mask = (
        ops.concatenate([ops.cast(past, dtype_of(new)), new], axis=1)
        for past, new in (
            (initial_state["key"], key),
            (initial_state["value"], value),
            (initial_state["key_mask"], key_mask),
        )
    )
    if sliding_window is not None and not (length and length <= sliding_window):
        # Queries for the keys of the past line both up; their outputs are dropped.
        past = ops.zeros_like(ops.repeat(initial_state["key"], query.shape[2] // key.shape[2], 2))
        aligned = ops.concatenate([ops.cast(past, dtype_of(query)), query], axis=1)
        output = sliding_window_attention(
            aligned, keys, values, sliding_window, causal=causal, key_mask=mask
        )[:, capacity:]
    else:
        mask_of_heads = ops.expand_dims(mask, 1)
        visible = _visible(query, keys, causal, sliding_window, mask_of_heads, offset=capacity)
        output = _dense(query, keys, values, visible)
    if not return_state:
        return output
    # Each row's state ends with its last unmasked key: padding behind it takes no room.
    following = ops.shape(key)[1] - ops.argmax(ops.cast(ops.flip(key_mask, 1), "int32"), axis=1)
    start = ops.cast(ops.where(ops.any(key_mask, axis=1), following, 0), "int32")
    kept = ops.expand_dims(start, -1) + ops.arange(capacity, dtype="int32")
    state = {
        name: ops.take_along_axis(tensor, ops.reshape(kept, (-1, capacity, 1, 1)), axis=1)
        for name, tensor in (("key", keys), ("value", values))
    }
    return output, {**state, "key_mask": ops.take_along_axis(mask, kept, axis=1)}


def empty_softmax_state(
    batch_size: Any, capacity: int, num_key_heads: int, head_dim: int, value_dim: int, dtype: str
) -> dict[str, Any]:
    """The state of `softmax_attention` before the first key.

    **Args**
        batch_size: B.
        capacity: Number of keys L that it can hold.
        num_key_heads: K.
        head_dim: H.
        value_dim: V.
        dtype: Type of keys and values.

    **Returns** A dictionary of `key` (B, L, K, H), `value` (B, L, K, V) and `key_mask` (B, L).

    **Example**

    >>> tuple(empty_softmax_state(1, 16, 2, 8, 8, "float32")["key"].shape)
    (1, 16, 2, 8)
    """
    return {
        "key": ops.zeros((batch_size, capacity, num_key_heads, head_dim), dtype),
        "value": ops.zeros((batch_size, capacity, num_key_heads, value_dim), dtype),
        "key_mask": ops.zeros((batch_size, capacity), "bool"),
    }


def softmax_weights(
    query: Any,
    key: Any,
    *,
    sliding_window: int | None = None,
    causal: bool = False,
    key_mask: Any = None,
    segment_ids: Any = None,
) -> Any:
    """The weights of `softmax_attention`, (B, N, T, S), to look at short inputs.

    **Cost** O(T S N H) time and O(T S N) memory.

    **Example**

    >>> x = np.ones((1, 5, 2, 8), "float32")
    >>> tuple(softmax_weights(x, x, sliding_window=2).shape)
    (1, 2, 5, 5)
    """
    query, key = ops.convert_to_tensor(query), ops.convert_to_tensor(key)
    output_dtype = dtype_of(query)
    dtype = wide_dtype(query)
    check_shapes(query, key, key, causal, segment_ids is not None)
    key_mask = check_key_mask(key_mask, key)
    key = _drop(key, key_mask)
    visible = _visible(query, key, causal, sliding_window, key_mask, segment_ids)
    key = ops.repeat(ops.cast(key, dtype), query.shape[2] // key.shape[2], axis=2)
    scores = ops.einsum("btnh,bsnh->bnts", ops.cast(query, dtype), key) * key.shape[-1] ** -0.5
    if visible is not None:
        scores = ops.where(visible, scores, -1e30)
    weights = ops.softmax(scores, axis=-1)
    if visible is not None:
        weights = ops.where(ops.any(visible, axis=-1, keepdims=True), weights, 0.0)
    return ops.cast(weights, output_dtype)


def _check_state(state: dict[str, Any], key: Any, value: Any) -> None:
    batch, _, num_heads, head_dim = key.shape
    heads = (batch, None, num_heads)
    expected = {"key": (*heads, head_dim), "value": (*heads, value.shape[3])}
    for name, shape in {**expected, "key_mask": (batch, None)}.items():
        found = tuple(state[name].shape) if name in state else ()
        if not fits(found, shape):
            raise ValueError(
                "initial_state must hold `key`, `value` and `key_mask` of as many rows and heads "
                "as the new keys: pass a state that was returned, or `empty_softmax_state(...)`. "
                f"Expected {name} of shape {shape}. Received: initial_state with "
                f"{', '.join(sorted(state)) or 'nothing'}"
                + (f", {name} of shape {found}" if found else "")
            )


def _drop(x: Any, key_mask: Any) -> Any:
    """Zero the masked keys of (B, S, K, H): what they hold, NaN included, does not matter."""
    if key_mask is None:
        return x
    mask = ops.expand_dims(ops.transpose(key_mask, (0, 2, 1)), -1)
    return ops.where(mask, x, ops.zeros((), dtype_of(x)))


def _visible(
    query: Any,
    key: Any,
    causal: bool,
    sliding_window: int | None,
    key_mask: Any = None,
    segment_ids: Any = None,
    offset: int = 0,
) -> Any:
    """What each query sees, boolean (B or 1, N or 1, T or 1, S), or None for everything.

    `offset` is the place of the first query among the keys.
    """
    parts = []
    if key_mask is not None:
        groups = query.shape[2] // key.shape[2] if key_mask.shape[1] != 1 else 1
        parts.append(ops.expand_dims(ops.repeat(key_mask, groups, axis=1), 2))
    segment_ids = check_segment_ids(segment_ids, query)
    if segment_ids is not None:
        runs = run_indices(segment_ids)
        parts.append(same_run(runs, runs))
    rows = ops.expand_dims(ops.arange(ops.shape(query)[1]), -1) + offset
    distance = rows - ops.expand_dims(ops.arange(ops.shape(key)[1]), 0)
    distance = ops.expand_dims(distance, (0, 1))
    if causal:
        parts.append(distance >= 0)
    if sliding_window is not None:
        parts.append(ops.abs(distance) < sliding_window)
    return functools.reduce(ops.logical_and, parts) if parts else None


def _dense(query: Any, key: Any, value: Any, visible: Any, causal: bool = False) -> Any:
    """The backend's softmax attention; `causal` counts where `visible` is None.

    A row that sees nothing gives zeros.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    # Some backends want one size for both.
    size = max(head_dim, value_dim)
    query, key, value = (_widen(t, size) for t in (query, key, value))
    if key.shape[2] == 1:
        # Keras repeats several heads, and leaves one to broadcasting, which TensorFlow's product
        # of matrices on CPUs refuses.
        key, value = (ops.repeat(t, query.shape[2], axis=2) for t in (key, value))
    if visible is not None:
        shape = (ops.shape(query)[0], 1, ops.shape(query)[1], ops.shape(key)[1])
        if visible.shape[1] != 1:
            shape = (shape[0], query.shape[2], *shape[2:])
        visible = ops.broadcast_to(visible, shape)
    output = ops.dot_product_attention(
        query,
        key,
        value,
        mask=visible,
        scale=head_dim**-0.5,
        is_causal=causal,
    )[..., :value_dim]
    if visible is None:
        return output
    seen = ops.transpose(ops.any(visible, axis=-1, keepdims=True), (0, 2, 1, 3))
    return ops.where(seen, output, ops.zeros((), dtype_of(output)))


def _widen(x: Any, size: int) -> Any:
    missing = size - x.shape[-1]
    return x if missing == 0 else ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))
