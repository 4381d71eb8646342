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

from keras_performer.ops._chunks import LOG_ZERO, dtype_of, exp, hide

# A feature over the smallest denominator is exp(70) then, and a sum of 1e7 of these a float32.
_RANGE = 70.0


# What happens inside one chunk.


def features(feature_map, x, operands, *, is_query):
    """Features of tokens (..., L, H) and their log scale (..., L, 1), or None for plain ones."""
    values, offset = feature_map.features(x, operands, is_query=is_query)
    if offset is None:
        return values, None
    top = ops.stop_gradient(ops.max(values, axis=-1, keepdims=True))
    # `clip` keeps float64, which `maximum` does not on PyTorch. No value is above zero; a bound
    # there would halve the gradient of the largest feature on JAX.
    phi = exp(ops.clip(values - top, -_RANGE, 1.0))
    return phi, top + offset


def key_features(feature_map, key, operands, mask):
    """Features of keys; the log scale of a masked key is that of zero."""
    phi, log_scale = features(feature_map, key, operands, is_query=False)
    if log_scale is not None:
        log_scale = ops.where(mask, log_scale, LOG_ZERO)
    return phi, log_scale


def attend_chunk(phi_q, phi_k, log_scale, value, visible, reads):
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
    if log_scale is not None:
        larger = ops.maximum(scale, ops.stop_gradient(ops.max(log_scale, axis=-2, keepdims=True)))
        sums = sums * exp(scale - larger)
        value = value * exp(log_scale - larger)
        scale = larger
    return sums + ops.matmul(ops.swapaxes(phi, -1, -2), value), scale


def keep_run(carry, value, log_scale, run, carried_run, kept_run):
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


def no_carry(query):
    """A carry for scans that carry nothing: the scan's outputs take their type from it."""
    return (ops.zeros((1,), dtype_of(query)),)


def initial_carry(state, key, value, feature_map, key_sum=0.0):
    """The sums with their column of key sums (B, K, M, V+1), and their log scale (B, K, 1, 1)."""
    if state is not None:
        scale = ops.max(state["log_max"], axis=-1, keepdims=True)
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
