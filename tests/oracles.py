"""Attention in float64, written as the formulas are: one pair of tokens at a time.

The tests compare the package with these functions, so nothing here imports it, and nothing is
fast or clever. Tensors are (B, T, N, H) as in the package; a mask is True where a key takes part.

Two rules hold in every function:

* a query that sees no key gives zeros;
* a segment is a *run* of equal ids: with ids 5, 5, 7, 5 the last token does not see the first.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def favor_log_features(x: Array, projection: Array, *, hyperbolic: bool = False) -> Array:
    """The logarithm of the FAVOR+ features of `x`, for the kernel exp(q.k / sqrt(H)).

    With x scaled by H^(-1/4), log phi_i = w_i.x - |x|^2/2 - log(M)/2. The hyperbolic map has 2M
    features, those of w_1..w_M and then those of -w_1..-w_M, and log(2M) in place of log(M).

    Args:
        x: (B, T, N, H).
        projection: (M, H), one w per row.
        hyperbolic: whether to add the mirrored features.

    Returns:
        (B, T, N, M), or (B, T, N, 2M) if hyperbolic.
    """
    x = np.asarray(x, np.float64)
    rows = [np.asarray(row, np.float64) for row in projection]
    if hyperbolic:
        rows = rows + [-row for row in rows]
    features = np.zeros((*x.shape[:3], len(rows)))
    for b, t, n in np.ndindex(*x.shape[:3]):
        scaled = x[b, t, n] / x.shape[3] ** 0.25
        for i, row in enumerate(rows):
            exponent = np.dot(row, scaled) - np.dot(scaled, scaled) / 2
            features[b, t, n, i] = exponent - np.log(len(rows)) / 2
    return features


def kernel_attention_loop(
    phi_log_q: Array,
    phi_log_k: Array,
    value: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
) -> Array:
    """Attention with the weights sum_m exp(phi_log_q[t, m] + phi_log_k[s, m]).

    Args:
        phi_log_q: (B, T, N, M), logarithms of the query features; -inf is a feature of zero.
        phi_log_k: (B, S, N, M), the same for the keys.
        value: (B, S, N, V).
        causal: whether query t sees only the keys s <= t.
        key_mask: (B, S), or (B, N, S) for a mask per head.
        segment_ids: (B, T), for T = S.

    Returns:
        (B, T, N, V), float64. No norm overflows or underflows: every weight is a log-sum-exp and
        every row is scaled by its largest weight.
    """
    phi_log_q = np.asarray(phi_log_q, np.float64)
    phi_log_k = np.asarray(phi_log_k, np.float64)

    def log_weight(b: int, t: int, s: int, n: int) -> float:
        exponents = phi_log_q[b, t, n] + phi_log_k[b, s, n]
        largest = np.max(exponents)
        if largest == -np.inf:
            return -np.inf
        return float(largest + np.log(np.sum(np.exp(exponents - largest))))

    visible = _visibility(phi_log_q, phi_log_k, causal, key_mask, segment_ids)
    return _average(phi_log_q.shape[:3], value, visible, log_weight, heads_per_value=1)


def plain_attention_loop(
    phi_q: Array,
    phi_k: Array,
    value: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
) -> Array:
    """Attention with the weights phi_q[t].phi_k[s], for features that are not negative.

    A row whose weights are all zero gives zeros. Arguments and result as in
    `kernel_attention_loop`, with the features themselves in place of their logarithms.
    """
    phi_q = np.asarray(phi_q, np.float64)
    phi_k = np.asarray(phi_k, np.float64)
    value = np.asarray(value, np.float64)
    visible = _visibility(phi_q, phi_k, causal, key_mask, segment_ids)
    output = np.zeros((*phi_q.shape[:3], value.shape[3]))
    for b, t, n in np.ndindex(*phi_q.shape[:3]):
        numerator = np.zeros(value.shape[3])
        denominator = 0.0
        for s in range(phi_k.shape[1]):
            if visible(b, t, s, n):
                weight = np.dot(phi_q[b, t, n], phi_k[b, s, n])
                numerator += weight * value[b, s, n]
                denominator += weight
        if denominator > 0:
            output[b, t, n] = numerator / denominator
    return output


def softmax_attention_loop(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
    sliding_window: int | None = None,
) -> Array:
    """Softmax attention with the weights exp(q.k / sqrt(H)).

    Args:
        query: (B, T, N, H).
        key: (B, S, K, H), K dividing N: query head n reads key head n // (N / K).
        value: (B, S, K, V).
        causal: whether query t sees only the keys s <= t.
        key_mask: (B, S), or (B, N, S) for a mask per *query* head.
        segment_ids: (B, T), for T = S.
        sliding_window: W, to see only the keys with |t - s| < W; 1 is the token itself.

    Returns:
        (B, T, N, V), float64.
    """
    query = np.asarray(query, np.float64)
    key = np.asarray(key, np.float64)
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "The number of key heads must divide the number of query heads. "
            f"Received: {key.shape[2]} and {query.shape[2]}."
        )
    heads_per_key = query.shape[2] // key.shape[2]

    def log_weight(b: int, t: int, s: int, n: int) -> float:
        return float(np.dot(query[b, t, n], key[b, s, n // heads_per_key])) / query.shape[3] ** 0.5

    visible = _visibility(query, key, causal, key_mask, segment_ids, sliding_window)
    return _average(query.shape[:3], value, visible, log_weight, heads_per_key)


def windowed_attention_loop(
    query: Array,
    key: Array,
    value: Array,
    phi_log_q: Array,
    phi_log_k: Array,
    window: int,
    num_sinks: int = 0,
    *,
    far_bias: Array | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    segment_ids: Array | None = None,
) -> Array:
    """Attention with the weights exp(q.k / sqrt(H)) for near keys, and features for the others.

    A token's block is the number of tokens since its sequence's first unmasked one, divided by
    `window` and rounded down; keys of the same and of neighbouring blocks are near, and so are the
    first `num_sinks` keys of a sequence. The others weigh exp(far_bias) (N,) times as much.
    Arguments otherwise as in `kernel_attention_loop`, with query and key (B, T, N, H).
    """
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, length = query.shape[:2]
    runs = np.zeros((batch, length), int) if segment_ids is None else segment_runs(segment_ids)
    mask = np.ones((batch, length), bool) if key_mask is None else np.asarray(key_mask, bool)
    position = np.zeros((batch, length), int)
    for b, t in np.ndindex(batch, length):
        of_sequence = [s for s in range(length) if runs[b, s] == runs[b, t] and mask[b, s]]
        position[b, t] = t - (of_sequence[0] if of_sequence else 0)

    def log_weight(b: int, t: int, s: int, n: int) -> float:
        near = abs(position[b, t] // window - position[b, s] // window) <= 1
        if near or position[b, s] < num_sinks:
            return float(np.dot(query[b, t, n], key[b, s, n])) / query.shape[3] ** 0.5
        exponents = phi_log_q[b, t, n] + phi_log_k[b, s, n]
        largest = np.max(exponents)
        bias = 0.0 if far_bias is None else float(far_bias[n])
        return bias + float(largest + np.log(np.sum(np.exp(exponents - largest))))

    visible = _visibility(query, key, causal, key_mask, segment_ids)
    return _average(query.shape[:3], value, visible, log_weight, heads_per_value=1)


def segment_runs(segment_ids: Array) -> Array:
    """Numbers the runs of equal ids of every row: 5, 5, 7, 5 becomes 0, 0, 1, 2."""
    runs = np.zeros(np.shape(segment_ids), int)
    for b, row in enumerate(np.asarray(segment_ids)):
        for t in range(1, len(row)):
            runs[b, t] = runs[b, t - 1] + int(row[t] != row[t - 1])
    return runs


def _visibility(
    query: Array,
    key: Array,
    causal: bool,
    key_mask: Array | None,
    segment_ids: Array | None,
    sliding_window: int | None = None,
) -> Callable[[int, int, int, int], bool]:
    """Returns visible(b, t, s, n): whether query t sees key s in head n."""
    runs = None
    if segment_ids is not None:
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                "segment_ids need as many keys as queries. "
                f"Received: T={query.shape[1]}, S={key.shape[1]}."
            )
        runs = segment_runs(segment_ids)

    def visible(b: int, t: int, s: int, n: int) -> bool:
        if causal and s > t:
            return False
        if sliding_window is not None and abs(t - s) >= sliding_window:
            return False
        if runs is not None and runs[b, t] != runs[b, s]:
            return False
        if key_mask is None:
            return True
        return bool(key_mask[b, s] if np.ndim(key_mask) == 2 else key_mask[b, n, s])

    return visible


def _average(
    shape: tuple[int, ...],
    value: Array,
    visible: Callable[[int, int, int, int], bool],
    log_weight: Callable[[int, int, int, int], float],
    heads_per_value: int,
) -> Array:
    """The weighted mean of the visible values, for every (b, t, n) of `shape`."""
    value = np.asarray(value, np.float64)
    output = np.zeros((*shape, value.shape[3]))
    for b, t, n in np.ndindex(*shape):
        keys = [s for s in range(value.shape[1]) if visible(b, t, s, n)]
        logs = [log_weight(b, t, s, n) for s in keys]
        largest = max(logs, default=-np.inf)
        if largest == -np.inf:
            continue
        denominator = 0.0
        for s, log in zip(keys, logs, strict=True):
            weight = np.exp(log - largest)
            output[b, t, n] += weight * value[b, s, n // heads_per_value]
            denominator += weight
        output[b, t, n] /= denominator
    return output
