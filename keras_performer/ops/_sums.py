"""Running sums of features: what a chunk of keys adds, and what a chunk of queries reads.

**Scale.** A token's features are divided by their own maximum, whose logarithm travels beside them
as `log_scale`. The weight of a key is `exp(log_scale_j - r_i) * (phi_i . phi_j)`, with r_i the
largest log scale that query i may see, among the keys of its chunk and the state it reads. So
nothing overflows, no row depends on a key it must not see, and no epsilon is needed. The query's
own log scale cancels, unless exact scores stand beside the features.

**Range.** Features span `_RANGE` nats below their maximum; one that is smaller still is held at
that floor. The largest feature of a query is 1, so every row with a visible key has a denominator
of at least exp(-70), and a quotient by it and its gradient stay within float32, at any norm.
"""

from keras import ops

from keras_performer.ops._chunks import LOG_ZERO, by_hand, dtype_of, exp, hide, normalize, same_run

# A feature over the smallest denominator is exp(70) then, and a sum of 1e7 of these a float32.
_RANGE = 70.0


_MOST_CHUNKS = 16
"""The most chunks a step."""
_STEP_NUMBERS = 2**20
"""The most numbers in an array of a step of several chunks: they stay in the caches."""
_CHUNKS_UNKNOWN = 4
"""Chunks a step where the batch size is not known."""


def most_chunks(numbers):
    """The most chunks a step if the largest array of each has so many numbers, static or not."""
    if not isinstance(numbers, int):
        return _CHUNKS_UNKNOWN
    return max(1, min(_MOST_CHUNKS, _STEP_NUMBERS // numbers))


# What happens inside one chunk.


def features(feature_map, x, operands, *, is_query):
    """Features of tokens (..., L, H) and their log scale (..., L, 1), or None for plain ones."""
    values, offset = feature_map.features(x, operands, is_query=is_query)
    if offset is None:
        return values, None
    top = ops.stop_gradient(ops.max(values, axis=-1, keepdims=True))
    if hand := by_hand(values):
        return hand.positive(values, top, -_RANGE), top + offset
    return exp(ops.threshold(values - top, -_RANGE, -_RANGE)), top + offset


def key_features(feature_map, key, operands, mask):
    """Features of keys; the log scale of a masked key is that of zero."""
    phi, log_scale = features(feature_map, key, operands, is_query=False)
    if log_scale is not None:
        log_scale = ops.where(mask, log_scale, LOG_ZERO)
    return phi, log_scale


def attend_chunk(phi_q, phi_k, log_scale, value, visible, reads):
    """Sum a chunk's visible values and the states' into (B, K, ..., R, V+1), under one row maximum.

    `visible` is boolean and broadcasts to (B, K, ..., R, C). Each read is (sums
    (B, K, ..., M, V+1), log scale (B, K, ..., 1, 1), boolean gate (B, 1, ..., R, 1) or None).
    """
    scores = ops.matmul(phi_q, ops.swapaxes(phi_k, -1, -2))
    if log_scale is None:
        total = ops.matmul(ops.where(visible, scores, 0.0), value)
        for sums, _, gate in reads:
            read = ops.matmul(phi_q, sums)
            total = total + (read if gate is None else ops.where(gate, read, 0.0))
        return total
    log_weights = hide(ops.swapaxes(log_scale, -1, -2), visible)
    scales = [
        scale if gate is None else ops.where(gate, scale, LOG_ZERO) for _, scale, gate in reads
    ]
    # Above the log of zero, so that what a row must not see weighs nothing even if it sees nothing.
    row_max = ops.maximum(ops.max(log_weights, axis=-1, keepdims=True), LOG_ZERO / 2)
    for scale in scales:
        row_max = ops.maximum(row_max, scale)
    row_max = ops.stop_gradient(row_max)
    total = ops.matmul(scores * exp(log_weights - row_max), value)
    for (sums, _, _), scale in zip(reads, scales, strict=True):
        total = total + exp(scale - row_max) * ops.matmul(phi_q, sums)
    return total


def absorb(carry, value, phi, log_scale):
    """Add a chunk of keys to the sums (B, K, M, V+1), rescaled to the larger log scale."""
    sums, scale = carry
    if log_scale is not None and (hand := by_hand(sums, scale, value, phi, log_scale)):
        return hand.absorb(_absorb, sums, scale, value, phi, log_scale)
    return _absorb(sums, scale, value, phi, log_scale)


def read(phi, sums):
    """The outputs (B, K, R, V) of queries that see the sums (B, K, M, V+1) alone."""
    if hand := by_hand(phi, sums):
        return hand.read(_read, phi, sums)
    return _read(phi, sums)


def _read(phi, sums):
    return normalize(ops.matmul(phi, sums))


def _absorb(sums, scale, value, phi, log_scale):
    if log_scale is not None:
        larger = ops.maximum(scale, ops.stop_gradient(ops.max(log_scale, axis=-2, keepdims=True)))
        sums = sums * exp(scale - larger)
        value = value * exp(log_scale - larger)
        scale = larger
    return sums + ops.matmul(ops.swapaxes(phi, -1, -2), value), scale


def sums_of_chunks(phi, value, log_scale):
    """The sums (B, K, E, M, V+1) of each of E chunks (B, K, E, C, ...), and scales (B, K, E, 1)."""
    scale = ops.zeros((*ops.shape(value)[:3], 1), dtype_of(value))
    if log_scale is not None:
        largest = ops.stop_gradient(ops.max(log_scale, axis=-2, keepdims=True))
        value, scale = value * exp(log_scale - largest), ops.squeeze(largest, -1)
    return ops.matmul(ops.swapaxes(phi, -1, -2), value), scale


def side_by_side(outer, own):
    """Give sums and log scales one axis of n = outer + E.

    Args:
        outer: Pairs of sums (B, K, M, V+1) and log scale (B, K, 1, 1).
        own: Sums (B, K, E, M, V+1) and log scales (B, K, E, 1).

    Returns:
        Sums (B, K, n, M, V+1) and log scales (B, K, n).
    """
    sums = [*(ops.expand_dims(s, 2) for s, _ in outer), own[0]]
    scales = [*(ops.squeeze(s, -1) for _, s in outer), ops.squeeze(own[1], -1)]
    return ops.concatenate(sums, axis=2), ops.concatenate(scales, axis=-1)


def combine(sums, scales, seen):
    """For each row add up the sums that it has `seen`, booleans (..., rows, n).

    Returns:
        Sums (B, K, rows, M, V+1) and log scales (B, K, rows, 1, 1).
    """
    scales = ops.where(seen, ops.expand_dims(scales, 2), LOG_ZERO)
    largest = ops.max(scales, axis=-1, keepdims=True)
    batch, num_heads, count, num_features, width = ops.shape(sums)
    flat = ops.reshape(sums, (batch, num_heads, count, num_features * width))
    combined = ops.matmul(exp(scales - largest), flat)
    rows = seen.shape[-2]  # static, where the product does not say so
    combined = ops.reshape(combined, (batch, num_heads, rows, num_features, width))
    return combined, ops.expand_dims(largest, -1)


def sums_before(carry, phi, value, log_scale, run=None, edges=None):
    """The sums before each of E chunks of keys, and the carry after the last.

    Args:
        carry: The carry before the first.
        phi: (B, K, E, C, M).
        value: (B, K, E, C, V+1).
        log_scale: None or (B, K, E, C, 1).
        run: None or the keys' runs (B, E, C).
        edges: None or `run_edges` of these.

    Returns:
        Sums (B, K, E, M, V+1) and log scale (B, K, E, 1, 1), and the next carry.
    """
    count = phi.shape[2]
    if count == 1 and edges is None:  # as in decoding, token by token
        before = tuple(ops.expand_dims(x, 2) for x in carry)
        return before, tuple(ops.squeeze(x, 2) for x in absorb(before, value, phi, log_scale))
    place = ops.arange(count + 1)
    seen = ops.expand_dims(place, -1) >= place
    if edges is not None:
        seen = ops.logical_and(seen, same_run(edges, edges))
        value, log_scale = keep_keys(value, log_scale, run, edges[:, 1:])
    sums = side_by_side([carry], sums_of_chunks(phi, value, log_scale))
    # Two products: slices of a large one would be copied, forwards and backwards.
    after = combine(*sums, seen[..., count:, :])
    return combine(*sums, seen[..., :count, :]), tuple(ops.squeeze(x, 2) for x in after)


def run_edges(run, carried_run):
    """The runs (B, E+1) of the sums before each chunk of runs (B, E, C), and after the last."""
    return ops.concatenate([ops.expand_dims(carried_run, -1), run[:, :, -1]], axis=1)


def keep_keys(value, log_scale, run, kept_run):
    """Drop from keys of runs (B, ..., C) what is not of the run `kept_run` (B, ...)."""
    belongs = ops.expand_dims(ops.equal(run, ops.expand_dims(kept_run, -1)), (1, -1))
    value = ops.where(belongs, value, 0.0)
    if log_scale is not None:
        log_scale = ops.where(belongs, log_scale, LOG_ZERO)
    return value, log_scale


def keep_run(carry, value, log_scale, run, carried_run, kept_run):
    """Drop from the carry and from a chunk of keys what is not of the run `kept_run` (B,)."""
    sums, scale = carry
    keep = ops.reshape(ops.equal(carried_run, kept_run), (-1, 1, 1, 1))
    sums = ops.where(keep, sums, 0.0)
    if log_scale is not None:
        scale = ops.where(keep, scale, LOG_ZERO)
    return (sums, scale), *keep_keys(value, log_scale, run, kept_run)


# State.


def no_carry(query):
    """A carry for scans that carry nothing: the scan's outputs take their type from it."""
    return (ops.zeros((1,), dtype_of(query)),)


def initial_carry(state, key, value, feature_map, key_sum=0.0):
    """The sums with their column of key sums (B, K, M, V+1), and their log scale (B, K, 1, 1)."""
    if state is not None:
        scale = ops.max(state["log_max"], axis=-1, keepdims=True)
        if not feature_map.log_space:  # whose sums are never rescaled
            scale = ops.zeros_like(scale)
        factor = exp(state["log_max"] - scale)
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


def as_state(carry):
    """The public state that a carry stands for; the reverse of `initial_carry`."""
    sums, scale = carry
    return {
        "kv": sums[..., :-1],
        "k_sum": sums[..., -1],
        "log_max": ops.broadcast_to(ops.squeeze(scale, -1), ops.shape(sums)[:-1]),
    }
