"""Faster implementation of `favor_attention` with an exact near field, for whole sequences.

Rows are moved so that each begins at its first unmasked token. The grid of blocks then is that of
the slots: a block of W queries meets two or three blocks of keys exactly, and all the others
through one state, so no pair is weighed through features. A step of the scan takes several blocks;
what each of them sees of the step's own keys is a sum of block states, weighed in one product.

The layout is that of `_chunked`, with G blocks a step: query (B, K, G, R, H) for R = W rows of each
query group, keys (B, K, L, H) for the L slots of the step's blocks and their neighbours.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_performer.ops._chunks import (
    LOG_ZERO,
    by_chunks,
    by_hand,
    dtype_of,
    exp,
    hide,
    is_one,
    normalize,
    overlapping,
    part,
    rows_by_steps,
    rows_of_steps,
    split,
    with_ones,
)
from keras_performer.ops._near_field import NearField
from keras_performer.ops._scan import carries_of, scan
from keras_performer.ops._sums import (
    absorb,
    combine,
    features,
    initial_carry,
    key_features,
    no_carry,
    side_by_side,
    sums_before,
    sums_of_chunks,
)

_STEP = 1024
"""Tokens a step, in whole blocks."""

_MOST_BLOCKS = 128
"""Blocks a step: it combines each one's sums with every other's."""


def why_not(*, exact_window: int | None, segmented: bool, stateful: bool) -> str | None:
    """Say in one sentence why this implementation cannot run, or return None."""
    if not exact_window:
        return "implementation='blocked' is for an exact near field: set exact_window."
    if segmented or stateful:
        return (
            "implementation='blocked' takes whole sequences, one a row: take 'windowed' for "
            "segment_ids and states."
        )
    return None


def attend(
    query: Any,
    key: Any,
    value: Any,
    feature_map: Any,
    operands: tuple[Any, ...],
    *,
    causal: bool,
    key_mask: Any,
    runs: Any,
    state: dict[str, Any] | None,
    near: NearField,
) -> tuple[Any, dict[str, Any]]:
    """Compute attention in O(T (W (H + V) + M (H + V))) time and memory linear in T.

    Arguments and result are those of `_windowed.attend`; `runs` and `state` are None.
    """
    del runs, state
    length = ops.shape(query)[3]
    # A block is no longer than the sequence, whose queries are padded to whole ones.
    window = min(near.window, length) if isinstance(length, int) else near.window
    first = -near.positions[:, 0]
    tensors = (query, key, value, key_mask)

    def moved() -> tuple[Any, ...]:
        return tuple(_moved(x, axis, first) for x, axis in zip(tensors, (3, 2, 2, 2), strict=True))

    # Seldom: rows that are padded on the left. A GPU waits where it is asked, so once.
    moves = None if near.unmasked else ops.any(first != 0)
    if moves is not None:
        query, key, value, key_mask = ops.cond(moves, moved, lambda: tensors)
    size, num_steps = _plan(length, window)
    after = 0 if causal else window
    empty = initial_carry(None, key, value, feature_map)
    value = with_ones(value, key_mask)
    arrays = {"query": rows_by_steps(query, window, size, num_steps)}
    beside = {"lead": window, "before": window, "after": after}
    for name, x in (("key", key), ("value", value), ("mask", key_mask)):
        arrays[name] = overlapping(x, 2, size * window, num_steps, **beside)
    sinks, count = (), 0
    if near.num_sinks:
        place = ops.expand_dims(ops.arange(num_steps * size * window, dtype="int32"), 0)
        # What lies before the first key is a sink here too, and masked.
        place = overlapping(place, 1, size * window, num_steps, **beside)
        arrays["is_sink"] = place < near.num_sinks
        arrays["block"] = split(ops.arange(num_steps * size, dtype="int32"), 0, size)
        smaller = min if isinstance(length, int) else ops.minimum
        count = smaller(near.num_sinks, length)
        sinks = tuple(part(x, 2, 0, count) for x in (key, value))
    # Two blocks see each other: there is nothing beyond.
    has_far = not (isinstance(num_steps, int) and num_steps * size <= 2)
    if has_far and not causal and not is_one(num_steps):
        arrays |= _sums_beside(arrays, feature_map, operands, empty, size * window)
    order = ops.convert_to_tensor(_order(causal, window, query.shape[2]))
    sides = [side for side in ("before", "after") if f"{side}_sums" in arrays]
    seen = None if causal else ops.convert_to_tensor(_seen_blocks(size, len(sides)))

    def step(carry, xs, weights):
        tile = dict(zip(arrays, xs, strict=True))
        weights, sink = weights[: len(operands)], weights[len(operands) :]
        q = tile["query"]
        k, v, m = (by_chunks(tile[name], window) for name in ("key", "value", "mask"))
        others = []
        if sink:
            sees = _sees_sinks(tile["block"], key_mask[:, :, :count], window, causal)
            others = [(*(ops.expand_dims(x, 2) for x in sink), sees)]

        def weigh(q, k, v, *far):
            near_key, near_value, near_mask = (_near_blocks(x, size) for x in (k, v, m))
            visible = ops.logical_and(order, ops.expand_dims(near_mask, 3))
            return _weigh(q, [(near_key, near_value, visible), *others], far)

        if not has_far:
            return carry, (weigh(q, k, v),)
        phi_q, log_q = features(feature_map, q, weights, is_query=True)
        if causal:  # the last block is none that the step's queries read
            keys = _block_features(tile, feature_map, weights, window, size)
            (read, scale), carry = sums_before(carry, *keys)
        else:
            keys = _block_features(tile, feature_map, weights, window, size + 2)
            outer = [(tile[f"{side}_sums"], tile[f"{side}_scale"]) for side in sides]
            read, scale = combine(*side_by_side(outer, sums_of_chunks(*keys)), seen)
        tensors = (q, k, v, phi_q, read, log_q + scale)
        if not sink and (hand := by_hand(*tensors)):
            return carry, (hand.block_step(weigh, *tensors, m, causal),)
        return carry, (weigh(*tensors),)

    _, (output,) = scan(
        step,
        empty if causal and has_far else no_carry(query),
        tuple(arrays.values()),
        (*operands, *sinks),
        output_shapes=[(*ops.shape(arrays["query"])[1:-1], value.shape[-1] - 1)],
    )
    output = rows_of_steps(output, query, window)
    if moves is not None:
        output = ops.cond(moves, lambda: _moved(output, 3, -first), lambda: output)
    return output, {}


# Rows and blocks.


def _moved(x, axis, amount):
    """Let slot t of each row of `axis` become its slot t + amount (B,); zeros come in."""
    shape, rest = ops.shape(x), [1 for _ in x.shape[axis + 1 :]]
    length, heads = shape[axis], shape[1:axis]
    slots = ops.expand_dims(amount, -1) + ops.arange(length, dtype="int32")
    inside = ops.logical_and(slots >= 0, slots < length)
    # Whole rows are taken: their gradient is added row by row as well.
    lines = ops.reshape(x, (-1, *shape[axis + 1 :]))
    line = ops.arange(ops.shape(lines)[0] // length, dtype="int32") * length
    line = ops.reshape(line, (shape[0], -1, 1))
    index = line + ops.expand_dims(ops.clip(slots, 0, length - 1), 1)
    moved = ops.reshape(ops.take(lines, ops.reshape(index, (-1,)), axis=0), shape)
    inside = ops.reshape(inside, (shape[0], *(1 for _ in heads), length, *rest))
    return ops.where(inside, moved, ops.zeros((), dtype_of(x)))


def _plan(length, window):
    """Blocks a step, and number of steps."""
    size = max(1, min(_STEP // window, _MOST_BLOCKS))
    if not isinstance(length, int):
        return size, (length + size * window - 1) // (size * window)
    num_blocks = -(-length // window)
    num_steps = -(-num_blocks // size)
    size = -(-num_blocks // num_steps)
    return size, -(-num_blocks // size)


def _near_blocks(x, size):
    """Blocks (B, K, E, W, ...), E - G of them neighbours, -> (B, K, G, (1 + E - G) W, ...)."""
    parts = [part(x, 2, i, size) for i in range(x.shape[2] - size + 1)]
    return ops.concatenate(parts, axis=3)


def _order(causal, window, num_groups):
    """What a block's rows may see of its near keys by their order: (1, 1, 1, R or 1, L)."""
    if not causal:
        return np.ones((1, 1, 1, 1, 1), bool)
    order = np.concatenate([np.ones((window, window), bool), np.tri(window, dtype=bool)], axis=1)
    return np.tile(order, (num_groups, 1))[None, None, None]


def _sees_sinks(block, sink_mask, window, causal):
    """Whether the queries of `block` (G,) see a sink by its own column: (B, K or 1, G, 1, s)."""
    sink_block = ops.arange(ops.shape(sink_mask)[2], dtype="int32") // window
    apart = ops.expand_dims(block, -1) - sink_block
    beyond = apart > 1 if causal else ops.abs(apart) > 1
    visible = ops.logical_and(ops.expand_dims(sink_mask, 2), beyond)
    return ops.expand_dims(visible, 3)


def _weigh(query, near, far):
    """The outputs of queries that see keys exactly, and sums of features beside them.

    Of `near` each is keys, values, and which of them are visible. `far` is empty or the features of
    the queries, the sums that they read, and the log scale of the two.
    """
    query = query * query.shape[-1] ** -0.5
    logits = [
        hide(ops.matmul(query, ops.swapaxes(key, -1, -2)), visible) for key, _, visible in near
    ]
    row_max = LOG_ZERO / 2
    for x in (*(ops.max(x, axis=-1, keepdims=True) for x in logits), *far[2:]):
        row_max = ops.maximum(row_max, x)
    row_max = ops.stop_gradient(row_max)
    parts = [ops.matmul(exp(x - row_max), v) for x, (_, v, _) in zip(logits, near, strict=True)]
    if far:
        phi, sums, scale = far
        parts.append(exp(scale - row_max) * ops.matmul(phi, sums))
    return normalize(sum(parts[1:], parts[0]))


# Sums of features.


def _far_keys(tile, start, length):
    """Key, value and mask of some of a step's slots, less the sinks."""
    key, value, mask = (part(tile[name], 2, start, length) for name in ("key", "value", "mask"))
    if "is_sink" in tile:
        far = ops.expand_dims(ops.logical_not(part(tile["is_sink"], 1, start, length)), 1)
        mask = ops.logical_and(mask, far)
        value = ops.where(ops.expand_dims(far, -1), value, 0.0)
    return key, value, mask


def _sums_beside(arrays, feature_map, operands, empty, length):
    """For every step the sums of the keys that lie before its slots, and of those behind them."""
    names = [name for name in ("key", "value", "mask", "is_sink") if name in arrays]
    found = {}
    for side, start in (("before", 0), ("after", arrays["key"].shape[3] - length)):

        def step(carry, xs, weights, start=start):
            key, value, mask = _far_keys(dict(zip(names, xs, strict=True)), start, length)
            keys = key_features(feature_map, key, weights, ops.expand_dims(mask, -1))
            return absorb(carry, value, *keys)

        xs = tuple(arrays[name] for name in names)
        sums, scale = carries_of(step, empty, xs, operands, reverse=side == "after")
        found |= {f"{side}_sums": sums, f"{side}_scale": scale}
    return found


def _block_features(tile, feature_map, operands, window, count):
    """Features, values and log scales (B, K, E, W, ...) of a step's first blocks."""
    key, value, mask = (by_chunks(x, window) for x in _far_keys(tile, 0, count * window))
    phi, log_scale = key_features(feature_map, key, operands, ops.expand_dims(mask, -1))
    return phi, value, log_scale


def _seen_blocks(size, num_outer):
    """Which sums the queries of each block read: all outer ones, and its own but the near."""
    own = np.abs(np.arange(size + 2) - 1 - np.arange(size)[:, None]) > 1
    return np.concatenate([np.ones((size, num_outer), bool), own], axis=1)
