"""Linear-time implementation of `favor_attention` in `keras.ops`: the portable default.

Tensors are laid out per key/value head: query (B, K, G, T, H), where G query heads share each of
the K key/value heads, key (B, K, S, H), value (B, K, S, V). The rows of a chunk of queries are
R = G*C. A column of ones is appended to the value, so that one product gives the numerator and the
denominator, and masking the value masks both.

**Scale.** A token's features are divided by their own maximum, whose logarithm travels beside them
as `log_scale`. The weight of a key is `exp(log_scale_j - r_i) * (phi_i . phi_j)`, with r_i the
largest log scale that query i may see, among the keys of its chunk and the state it reads. So
nothing overflows, no row depends on a key it must not see, and no epsilon is needed. The query's
own log scale cancels and is never computed.

**Range.** Features span `_RANGE` nats below their maximum and are multiplied by `_LIFT`. A product
of two of them, the quotient by the smallest denominator and its gradient all stay within float32,
so every row with a visible key has a positive denominator and finite gradients, at any norm. A
feature that is smaller still is held at that floor.
"""

from typing import Any

from keras import ops

from keras_performer.ops._chunks import (
    LOG_ZERO,
    cut,
    dtype_of,
    normalize,
    plan,
    same_run,
    tile_rows,
)
from keras_performer.ops._scan import scan

CHUNK = 128
"""Tokens a step when pairs within a chunk are formed (causal, or packed segments)."""
WIDE_CHUNK = 256
"""Tokens a step when only the state is built or read."""

# A product of two features over the smallest denominator is then exp(70) at most, and a sum of 1e7
# of them a float32.
_RANGE = 70.0
# A power of two, so that lifting rounds nothing.
_LIFT = 2.0**35


def why_not(*, exact_window: int | None, num_sink_tokens: int) -> str | None:
    """Say in one sentence why this implementation cannot run, or return None."""
    if exact_window or num_sink_tokens:
        return (
            "implementation='chunked' has no exact near field yet: leave exact_window=None and "
            f"num_sink_tokens=0. Received: exact_window={exact_window}, "
            f"num_sink_tokens={num_sink_tokens}."
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
) -> tuple[Any, dict[str, Any]]:
    """Compute attention in O(T M (H + V)) time and memory linear in T.

    Args:
        query: (B, K, G, T, H).
        key: (B, K, S, H), zero where masked.
        value: (B, K, S, V), zero where masked.
        feature_map: The map; `features` is called on chunks.
        operands: Tensors that `features` needs.
        causal: Whether query t sees keys up to t only.
        key_mask: None or boolean (B, K or 1, S).
        runs: None or integers (B, T): the index of each token's segment. The state belongs to 0.
        state: None or the features of keys seen before.

    Returns:
        The output (B, K, G, T, V) and the state after all keys.
    """
    if causal:
        return _causal(query, key, value, feature_map, operands, key_mask, runs, state)
    if runs is not None:
        return _packed(query, key, value, feature_map, operands, key_mask, runs)
    return _bidirectional(query, key, value, feature_map, operands, key_mask, state)


# The three walks over the sequence.


def _bidirectional(query, key, value, feature_map, operands, key_mask, state):
    keys = _key_chunks(key, value, key_mask, WIDE_CHUNK)

    def absorb(carry, x, weights):
        k, v, m = x
        return _absorb(carry, v, *_key_features(feature_map, k, weights, m)), ()

    carry, _ = scan(absorb, _initial_carry(state, key, value, feature_map), keys, operands)
    queries, length = _query_chunks(query, WIDE_CHUNK)

    def read(carry, x, weights):
        phi, _ = _features(feature_map, x[0], weights[1:], is_query=True)
        return carry, (normalize(ops.matmul(phi, weights[0])),)

    _, (output,) = scan(
        read,
        _no_carry(query),
        (queries,),
        (carry[0], *operands),
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return _join_chunks(output, query, length), _state(carry, feature_map)


def _causal(query, key, value, feature_map, operands, key_mask, runs, state):
    keys = _key_chunks(key, value, key_mask, CHUNK)
    queries, length = _query_chunks(query, CHUNK)
    num_groups = query.shape[2]
    run_chunks = () if runs is None else _run_chunks(runs, CHUNK)

    def step(carry, x, weights):
        q, k, v, m, *chunk_runs = x
        phi_q, _ = _features(feature_map, q, weights, is_query=True)
        phi_k, log_scale = _key_features(feature_map, k, weights, m)
        size = k.shape[2]
        position = ops.expand_dims(ops.arange(size), (0, 1, 2))
        visible = ops.swapaxes(position, -1, -2) >= position
        reads_state = None
        if chunk_runs:
            run, state_run = chunk_runs
            visible = ops.logical_and(visible, same_run(run, run))
            reads_state = tile_rows(same_run(run, ops.expand_dims(state_run, -1)), num_groups)
        weighted = _attend_chunk(
            phi_q, phi_k, log_scale, v, tile_rows(visible, num_groups), [(*carry, reads_state)]
        )
        if chunk_runs:
            carry, v, log_scale = _keep_run(carry, v, log_scale, run, state_run, run[:, -1])
        return _absorb(carry, v, phi_k, log_scale), (normalize(weighted),)

    carry, (output,) = scan(
        step,
        _initial_carry(state, key, value, feature_map, feature_map.causal_key_sum),
        (queries, *keys, *run_chunks),
        operands,
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return _join_chunks(output, query, length), _state(carry, feature_map)


def _packed(query, key, value, feature_map, operands, key_mask, runs):
    """Bidirectional attention within segments: pairs in a chunk, states from both sides."""
    keys = _key_chunks(key, value, key_mask, CHUNK)
    queries, length = _query_chunks(query, CHUNK)
    num_groups = query.shape[2]
    run, before = _run_chunks(runs, CHUNK)
    after = ops.concatenate([run[1:, :, 0], run[-1:, :, -1]], axis=0)
    empty = _initial_carry(None, key, value, feature_map)
    like = [ops.shape(t) for t in empty]

    def absorb_towards(edge):
        def step(carry, x, weights):
            k, v, m, run, neighbour = x
            phi, log_scale = _key_features(feature_map, k, weights, m)
            kept, v, log_scale = _keep_run(carry, v, log_scale, run, neighbour, run[:, edge])
            return _absorb(kept, v, phi, log_scale), carry

        return step

    _, prefix = scan(absorb_towards(-1), empty, (*keys, run, before), operands, output_shapes=like)
    _, suffix = scan(
        absorb_towards(0), empty, (*keys, run, after), operands, output_shapes=like, reverse=True
    )

    def step(carry, x, weights):
        q, k, v, m, run, before, after, *states = x
        phi_q, _ = _features(feature_map, q, weights, is_query=True)
        phi_k, log_scale = _key_features(feature_map, k, weights, m)
        reads = [
            (*states[:2], tile_rows(same_run(run, ops.expand_dims(before, -1)), num_groups)),
            (*states[2:], tile_rows(same_run(run, ops.expand_dims(after, -1)), num_groups)),
        ]
        weighted = _attend_chunk(
            phi_q, phi_k, log_scale, v, tile_rows(same_run(run, run), num_groups), reads
        )
        return carry, (normalize(weighted),)

    _, (output,) = scan(
        step,
        _no_carry(query),
        (queries, *keys, run, before, after, *prefix, *suffix),
        operands,
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return _join_chunks(output, query, length), {}


# What happens inside one chunk.


def _features(feature_map, x, operands, *, is_query):
    """Features of tokens (..., L, H) and their log scale (..., L, 1), or None for plain ones.

    Features with a scale are `_LIFT` times as large as that scale says. Taking the logarithm of the
    factor off the scale would round it, and the factor cancels in every quotient.
    """
    values, offset = feature_map.features(x, operands, is_query=is_query)
    if offset is None:
        return values, None
    top = ops.stop_gradient(ops.max(values, axis=-1, keepdims=True))
    phi = ops.exp(ops.maximum(values - top, -_RANGE)) * _LIFT
    return phi, top + offset


def _key_features(feature_map, key, operands, mask):
    """Features of keys; the log scale of a masked key is that of zero."""
    phi, log_scale = _features(feature_map, key, operands, is_query=False)
    if log_scale is not None:
        log_scale = ops.where(mask, log_scale, LOG_ZERO)
    return phi, log_scale


def _attend_chunk(phi_q, phi_k, log_scale, value, visible, reads):
    """Sum the chunk's visible values and the states' into (B, K, R, V+1), under one row maximum.

    `visible` is boolean (B or 1, 1, R, C). Each read is (sums (B, K, M, V+1), log scale
    (B, K, 1, 1), boolean gate (B, 1, R, 1) or None).
    """
    scores = ops.matmul(phi_q, ops.swapaxes(phi_k, -1, -2))
    if log_scale is None:
        total = ops.matmul(ops.where(visible, scores, 0.0), value)
        for sums, _, gate in reads:
            read = ops.matmul(phi_q, sums)
            total = total + (read if gate is None else ops.where(gate, read, 0.0))
        return total
    log_weights = ops.where(visible, ops.swapaxes(log_scale, -1, -2), LOG_ZERO)
    scales = [
        scale if gate is None else ops.where(gate, scale, LOG_ZERO) for _, scale, gate in reads
    ]
    # Above the log of zero, so that what a row must not see weighs nothing even if it sees nothing.
    row_max = ops.maximum(ops.max(log_weights, axis=-1, keepdims=True), LOG_ZERO / 2)
    for scale in scales:
        row_max = ops.maximum(row_max, scale)
    row_max = ops.stop_gradient(row_max)
    total = ops.matmul(scores * ops.exp(log_weights - row_max), value)
    for (sums, _, _), scale in zip(reads, scales, strict=True):
        total = total + ops.exp(scale - row_max) * ops.matmul(phi_q, sums)
    return total


def _absorb(carry, value, phi, log_scale):
    """Add a chunk of keys to the sums (B, K, M, V+1), rescaled to the larger log scale."""
    sums, scale = carry
    if log_scale is not None:
        larger = ops.maximum(scale, ops.stop_gradient(ops.max(log_scale, axis=-2, keepdims=True)))
        sums = sums * ops.exp(scale - larger)
        value = value * ops.exp(log_scale - larger)
        scale = larger
    return sums + ops.matmul(ops.swapaxes(phi, -1, -2), value), scale


def _keep_run(carry, value, log_scale, run, carried_run, kept_run):
    """Drop from the carry and from a chunk of keys what is not of the run `kept_run` (B,)."""
    sums, scale = carry
    keep = ops.reshape(ops.equal(carried_run, kept_run), (-1, 1, 1, 1))
    sums = ops.where(keep, sums, 0.0)
    belongs = ops.expand_dims(ops.equal(run, ops.expand_dims(kept_run, -1)), (1, 3))
    value = ops.where(belongs, value, 0.0)
    if log_scale is not None:
        scale = ops.where(keep, scale, LOG_ZERO)
        log_scale = ops.where(belongs, log_scale, LOG_ZERO)
    return (sums, scale), value, log_scale


# State.


def _no_carry(query):
    """A carry for scans that carry nothing: the scan's outputs take their type from it."""
    return (ops.zeros((1,), dtype_of(query)),)


def _initial_carry(state, key, value, feature_map, key_sum=0.0):
    """The sums with their column of key sums (B, K, M, V+1), and their log scale (B, K, 1, 1)."""
    if state is not None:
        scale = ops.max(state["log_max"], axis=-1, keepdims=True)
        factor = ops.exp(state["log_max"] - scale) * _lift(feature_map)
        sums = ops.concatenate(
            [
                state["kv"] * ops.expand_dims(factor, -1),
                ops.expand_dims(state["k_sum"] * factor, -1),
            ],
            axis=-1,
        )
        return sums, ops.expand_dims(ops.stop_gradient(scale), -1)
    shape = (*ops.shape(key)[:2], feature_map.feature_dim)
    zeros = ops.zeros((*shape, value.shape[-1]), dtype_of(value))
    key_sums = ops.zeros((*shape, 1), dtype_of(value)) + key_sum
    scale = ops.zeros((*shape[:2], 1, 1), dtype_of(value))
    if feature_map.log_space:
        scale = scale + LOG_ZERO
    return ops.concatenate([zeros, key_sums], axis=-1), scale


def _state(carry, feature_map):
    sums, scale = carry
    # Inside, features are lifted; the factor is a power of two, so nothing is rounded.
    sums = sums / _lift(feature_map)
    return {
        "kv": sums[..., :-1],
        "k_sum": sums[..., -1],
        "log_max": ops.broadcast_to(ops.squeeze(scale, -1), ops.shape(sums)[:-1]),
    }


def _lift(feature_map):
    return _LIFT if feature_map.log_space else 1.0


# Chunks of keys, queries and segments.


def _key_chunks(key, value, key_mask, largest):
    """Key (n, B, K, C, H), value with its ones (n, B, K, C, V+1), mask (n, B, K|1, C, 1)."""
    batch, _, length, _ = ops.shape(key)
    if key_mask is None:
        key_mask = ops.ones((batch, 1, length), "bool")
    mask = ops.expand_dims(key_mask, -1)
    ones = ops.broadcast_to(ops.cast(mask, dtype_of(value)), (*ops.shape(value)[:-1], 1))
    value = ops.concatenate([value, ones], axis=-1)
    return cut(key, 2, largest), cut(value, 2, largest), cut(mask, 2, largest)


def _query_chunks(query, largest):
    """Query rows (n, B, K, G*C, H) and the padded chunk length."""
    chunks = cut(query, 3, largest)
    num_chunks, batch, num_heads, num_groups, size, head_dim = ops.shape(chunks)
    rows = ops.reshape(chunks, (num_chunks, batch, num_heads, num_groups * size, head_dim))
    return rows, size


def _join_chunks(output, query, size):
    """(n, B, K, G*C, V) -> (B, K, G, T, V)."""
    num_chunks, batch, num_heads, _, value_dim = ops.shape(output)
    num_groups, length = ops.shape(query)[2:4]
    output = ops.reshape(output, (num_chunks, batch, num_heads, num_groups, size, value_dim))
    output = ops.transpose(output, (1, 2, 3, 0, 4, 5))
    output = ops.reshape(output, (batch, num_heads, num_groups, num_chunks * size, value_dim))
    return output[:, :, :, :length]


def _run_chunks(runs, largest):
    """Run indices (n, B, C), and the run (n, B) that the state before each chunk belongs to.

    Padding continues the last run, so that the state at the end is the last segment's.
    """
    size, num_chunks = plan(ops.shape(runs)[1], largest)
    padding = size * num_chunks - ops.shape(runs)[1]
    if not (isinstance(padding, int) and padding == 0):
        last = ops.broadcast_to(runs[:, -1:], (ops.shape(runs)[0], padding))
        runs = ops.concatenate([runs, last], axis=1)
    chunks = cut(runs, 1, largest)
    before = ops.concatenate([ops.zeros_like(chunks[:1, :, 0]), chunks[:-1, :, -1]], axis=0)
    return chunks, before
