"""The definition of `favor_attention`, in O(T S M): the truth, never fast.

Same layout and signature as `_chunked.attend`. Scores are formed in log space where the feature map
allows, so they hold at any norm, and every backend differentiates them by itself.
"""

from typing import Any

from keras import ops

from keras_performer.ops._chunks import LOG_ZERO
from keras_performer.ops._near_field import NearField


def why_not(**options: Any) -> str | None:
    """Return None: the definition always runs."""
    del options


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
    near: NearField | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Compute attention from every pair; see `_chunked.attend` and, for `near`, `_windowed`."""
    if near is not None and near.sinks is not None:
        key, value, key_mask, runs, near = _with_sinks(key, value, key_mask, runs, near)
    visible = visible_pairs(query, key, causal=causal, key_mask=key_mask, runs=runs)
    log_scores = _log_scores(query, key, feature_map, operands, near)
    log_scores = ops.where(visible, log_scores, LOG_ZERO)
    log_query = _log_features(query, feature_map, operands, is_query=True)
    log_key = _log_features(key, feature_map, operands, is_query=False)
    row_max = ops.max(log_scores, axis=-1, keepdims=True)
    # The features of keys seen before, one pseudo-key a feature, (B, K, G, T, M).
    log_read = None
    if state is not None:
        log_read = log_query + ops.expand_dims(state["log_max"], (2, 3))
        if runs is not None:
            first = ops.equal(runs[:, -ops.shape(query)[3] :], 0)
            first = ops.expand_dims(first, (1, 2, 4))
            log_read = ops.where(first, log_read, LOG_ZERO)
        row_max = ops.maximum(row_max, ops.max(log_read, axis=-1, keepdims=True))
    row_max = ops.stop_gradient(ops.maximum(row_max, LOG_ZERO / 2))
    scores = ops.exp(log_scores - row_max)
    numerator = ops.matmul(scores, ops.expand_dims(value, 2))
    denominator = ops.sum(scores, axis=-1, keepdims=True)
    if state is not None and log_read is not None:
        read = ops.exp(log_read - row_max)
        numerator = numerator + ops.matmul(read, ops.expand_dims(state["kv"], 2))
        k_sum = ops.expand_dims(state["k_sum"], (2, -1))
        denominator = denominator + ops.matmul(read, k_sum)
    elif causal and feature_map.causal_key_sum:
        key_sum = feature_map.causal_key_sum * ops.exp(log_query - row_max)
        denominator = denominator + ops.sum(key_sum, axis=-1, keepdims=True)
    seen = denominator > 0
    output = ops.where(seen, numerator / ops.where(seen, denominator, 1.0), 0.0)
    if near is not None and near.stays is not None:
        stays = ops.expand_dims(ops.logical_or(near.stays, near.is_sink(near.positions)), 1)
        key_mask = ops.logical_and(key_mask, ops.logical_not(stays))
    return output, _final_state(log_key, value, key_mask, runs, state)


def attention_weights(
    query: Any,
    key: Any,
    feature_map: Any,
    operands: tuple[Any, ...],
    *,
    causal: bool,
    key_mask: Any,
    runs: Any,
    near: NearField | None,
) -> Any:
    """Normalised weights (B, K, G, T, S) of every pair: rows sum to one, or to zero."""
    visible = visible_pairs(query, key, causal=causal, key_mask=key_mask, runs=runs)
    log_scores = _log_scores(query, key, feature_map, operands, near)
    log_scores = ops.where(visible, log_scores, LOG_ZERO)
    row_max = ops.maximum(ops.max(log_scores, axis=-1, keepdims=True), LOG_ZERO / 2)
    scores = ops.exp(log_scores - ops.stop_gradient(row_max))
    total = ops.sum(scores, axis=-1, keepdims=True)
    return ops.where(total > 0, scores / ops.where(total > 0, total, 1.0), 0.0)


def visible_pairs(query: Any, key: Any, *, causal: bool, key_mask: Any, runs: Any) -> Any:
    """Whether query t may see key s: boolean, broadcastable to (B, K, G, T, S).

    Causally, the last query is at the last key.
    """
    length, num_keys = ops.shape(query)[3], ops.shape(key)[2]
    rows = ops.expand_dims(ops.arange(length), -1) + (num_keys - length if causal else 0)
    columns = ops.expand_dims(ops.arange(num_keys), 0)
    visible = rows >= columns if causal else ops.logical_or(rows >= 0, columns >= 0)
    visible = ops.expand_dims(visible, (0, 1, 2))
    if key_mask is not None:
        visible = ops.logical_and(visible, ops.expand_dims(key_mask, (2, 3)))
    if runs is not None:
        same = ops.equal(ops.expand_dims(runs[:, -length:], -1), ops.expand_dims(runs, -2))
        visible = ops.logical_and(visible, ops.expand_dims(same, (1, 2)))
    return visible


def _with_sinks(key, value, key_mask, runs, near):
    """Put the state's sinks before the window, those that it no longer holds."""
    sink_key, sink_value, sink_mask = near.sinks
    index = ops.broadcast_to(
        ops.arange(near.num_sinks, dtype="int32"), (ops.shape(key)[0], near.num_sinks)
    )
    gone = ops.expand_dims(index < near.positions[:, :1], 1)
    key = ops.concatenate([sink_key, key], axis=2)
    value = ops.concatenate([sink_value, value], axis=2)
    key_mask = ops.concatenate([ops.logical_and(sink_mask, gone), key_mask], axis=2)
    if runs is not None:
        runs = ops.concatenate([ops.zeros_like(index), runs], axis=1)
    stays = near.stays
    if stays is not None:
        stays = ops.concatenate([ops.ones_like(index, "bool"), stays], axis=1)
    positions = ops.concatenate([index, near.positions], axis=1)
    return key, value, key_mask, runs, near._replace(positions=positions, stays=stays)


def _log_features(x, feature_map, operands, *, is_query):
    values, offset = feature_map.features(x, operands, is_query=is_query)
    if offset is not None:
        return values + offset
    # Zero features have no logarithm; the inner `where` keeps their gradient finite.
    positive = values > 0
    return ops.where(positive, ops.log(ops.where(positive, values, 1.0)), LOG_ZERO)


def _log_scores(query, key, feature_map, operands, near):
    """The logarithm of phi(q_t) . phi(k_s), or of exp(q.k) for near pairs, (B, K, G, T, S)."""
    if not feature_map.log_space:
        phi_q, _ = feature_map.features(query, operands, is_query=True)
        phi_k, _ = feature_map.features(key, operands, is_query=False)
        scores = ops.matmul(phi_q, ops.swapaxes(ops.expand_dims(phi_k, 2), -1, -2))
        positive = scores > 0
        return ops.where(positive, ops.log(ops.where(positive, scores, 1.0)), LOG_ZERO)
    log_query = _log_features(query, feature_map, operands, is_query=True)
    log_key = _log_features(key, feature_map, operands, is_query=False)
    pairs = ops.expand_dims(log_query, 4) + ops.expand_dims(log_key, (2, 3))
    scores = ops.logsumexp(pairs, axis=-1)
    if near is None:
        return scores
    logits = ops.matmul(query, ops.swapaxes(ops.expand_dims(key, 2), -1, -2))
    positions = near.positions[:, -ops.shape(query)[3] :]
    exact = ops.expand_dims(near.is_exact(positions, near.positions), 1)
    return ops.where(exact, logits * query.shape[-1] ** -0.5, scores)


def _final_state(log_key, value, key_mask, runs, state):
    """The features of all keys, or with segments of those of the last one, (B, K, M)."""
    belongs = None if key_mask is None else key_mask
    if runs is not None:
        last = ops.expand_dims(ops.equal(runs, runs[:, -1:]), 1)
        belongs = last if belongs is None else ops.logical_and(belongs, last)
    if belongs is not None:
        belongs = ops.expand_dims(belongs, -1)
        log_key = ops.where(belongs, log_key, LOG_ZERO)
        value = ops.where(belongs, value, 0.0)
    log_max = ops.max(log_key, axis=2)
    kept = None
    if state is not None:
        kept = state["log_max"]
        if runs is not None:
            same = ops.expand_dims(ops.equal(runs[:, -1], 0), (1, 2))
            kept = ops.where(same, kept, LOG_ZERO)
        log_max = ops.maximum(log_max, kept)
    log_max = ops.stop_gradient(log_max)
    phi = ops.exp(log_key - ops.expand_dims(log_max, 2))
    if belongs is not None:
        phi = ops.where(belongs, phi, 0.0)
    k_sum = ops.sum(phi, axis=2)
    kv = ops.matmul(ops.swapaxes(phi, -1, -2), value)
    if state is not None and kept is not None:
        factor = ops.where(kept > LOG_ZERO / 2, ops.exp(kept - log_max), 0.0)
        k_sum = k_sum + factor * state["k_sum"]
        kv = kv + ops.expand_dims(factor, -1) * state["kv"]
    return {"kv": kv, "k_sum": k_sum, "log_max": log_max}
