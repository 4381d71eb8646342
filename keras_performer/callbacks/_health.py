"""How well features stand in for softmax attention, measured on given queries and keys."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_performer.feature_maps import FavorPlus, FavorPlusPlus, FeatureMap
from keras_performer.layers._recording import AttentionRecord

DEFAULT_WINDOW = 64
"""The window whose share of attention is measured where there is no exact window."""


def layer_health(record: AttentionRecord, max_tokens: int | None = None) -> dict[str, np.ndarray]:
    """Compare the attention that a layer was seen to do with softmax attention, head by head.

    **Args**
        record: What `record_attention` saw of a call.
        max_tokens: Look at no more pairs of each sequence and head than its square; None takes all.

    **Returns** What `AttentionHealth` measures, a dictionary of arrays (N,); empty for exact
    attention, which has no features.

    **Example**

    >>> layer = keras_performer.layers.PerformerAttention(num_heads=2, key_dim=8)
    >>> x = np.random.default_rng(0).normal(size=(1, 9, 12)).astype("float32")
    >>> with keras_performer.layers.record_attention() as records:
    ...     _ = layer(x, x)
    >>> layer_health(records[0])["total_variation"].shape
    (2,)
    """
    layer = record.layer
    if layer.feature_map is None:
        return {}
    return attention_health(
        record.query,
        record.key,
        layer.feature_map,
        causal=record.causal,
        key_mask=record.key_mask,
        segment_ids=record.segment_ids,
        **layer.near_field(),
        max_tokens=max_tokens,
    )


def attention_health(
    query: Any,
    key: Any,
    feature_map: FeatureMap,
    *,
    causal: bool = False,
    key_mask: Any = None,
    segment_ids: Any = None,
    exact_window: int | None = None,
    num_sink_tokens: int = 0,
    far_bias: Any = None,
    max_tokens: int | None = None,
) -> dict[str, np.ndarray]:
    """Compare attention through features with softmax attention, head by head.

    Each figure is a mean over the queries, of all sequences, that see a key. Let w_ts be the
    softmax weights, x' = x H^(-1/4), and "far" the pairs that are not in the exact window and
    whose key is no sink token; with a `far_bias`, w_ts are those of scores that hold it:

    * `relative_variance`: sum_s w_ts (exp(|q'_t + k'_s|^2) - 1) / M over far s, the variance of
      an estimate over its square for `FavorPlus` with M independent rows, whose other options all
      lower it. For `FavorPlusPlus` it is what the paper gives for its averages. Absent for a
      trained projection, whose rows are not random.
    * `measured_relative_variance`: sum_s w_ts (phi(q_t).phi(k_s) / exp(q'_t.k'_s) - 1)^2 over far
      s, the error of this draw. It does not tell how hopeless a case is: where the variance is
      huge nearly every estimate is next to zero, and this is next to 1.
    * `window_share`: the share of w_ts on pairs that are not far, or without an exact window on
      those that one of 64 tokens would hold. Absent where T is not S.
    * `total_variation`: half the sum_s |w_ts - a_ts|, with a_ts the weights of the layer: 0 where
      they agree, 1 where they have nothing in common.
    * `effective_features`: (sum_i u_i)^2 / sum_i u_i^2 with u_i = phi_i(q_t) sum_s phi_i(k_s) over
      far s: M if all features carry the same, 1 if one carries all, 0 if no key is far.

    A map that does not estimate softmax has the last two alone. Estimates below zero count as zero.

    **Shapes and args** as in `favor_attention`: query (B, T, N, H), key (B, S, K, H), arrays or
    tensors. Where T is S, query t and key t are taken to be one token, which a key mask leaves out
    altogether. One is new:

        max_tokens: Look at no more pairs of each sequence and head than its square. Of longer
            sequences it takes a random part of the queries, the same at every call, one at least,
            and all keys: the weights of a row depend on every one of them. None takes all queries.

    **Returns** A dictionary of arrays (N,), float64. A head that no query uses has NaN.

    **Precision** Features in float32, all else in float64, in logarithms. What is beyond float64
    is infinite.

    **Cost** O(B N P (H + M)) time for P pairs a sequence.

    **Example**

    >>> x = np.random.default_rng(0).normal(size=(1, 9, 2, 8))
    >>> feature_map = keras_performer.feature_maps.FavorPlus(16, seed=0)
    >>> attention_health(x, x, feature_map)["total_variation"].shape
    (2,)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, lemma 2, and Likhosherstov et al. 2022,
    arXiv 2205.15317, theorem 1, for the variance; the effective features are the effective sample
    size of Kish 1965.
    """
    query, key = _to_numpy(query), _to_numpy(key)
    num_heads, num_key_heads = query.shape[2], key.shape[2]
    mask = np.ones(key.shape[:3], bool)
    if key_mask is not None:
        key_mask = _to_numpy(key_mask) != 0
        mask &= key_mask[:, :, None] if key_mask.ndim == 2 else np.swapaxes(key_mask, 1, 2)
    key = np.where(mask[..., None], key, np.float32(0))
    runs = np.zeros(key.shape[:2], int)
    if segment_ids is not None:
        ids = ops.convert_to_numpy(ops.convert_to_tensor(segment_ids))
        runs[:, 1:] = np.cumsum(ids[:, 1:] != ids[:, :-1], axis=1)
    if not feature_map.built:
        feature_map.build(key.shape)
    tuning = _tuning(feature_map, num_key_heads)
    biases = np.zeros(num_key_heads) if far_bias is None else _to_numpy(far_bias)

    found: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num_heads)]
    for q, k, m, run in zip(query, key, mask, runs, strict=True):
        same_tokens = len(q) == len(k)
        tokens = _sample(m.any(axis=1) if same_tokens else np.ones(len(q), bool), m, max_tokens)
        features_q, features_k = _features(feature_map, q[tokens], k, m)
        visible = np.ones((len(tokens), len(k)), bool)
        if causal:
            visible &= tokens[:, None] >= np.arange(len(k))
        if segment_ids is not None:
            visible &= run[tokens][:, None] == run
        near = None
        if same_tokens:
            window = exact_window or DEFAULT_WINDOW
            near = _near_pairs(tokens, m.any(axis=1), run, window, num_sink_tokens)
        for n in range(num_heads):
            j = n // (num_heads // num_key_heads)
            seen = visible & m[:, j]
            rows = seen.any(axis=1)
            if same_tokens:
                rows &= m[tokens, j]
            figures = _compare(
                _Head(q[tokens, n][rows], k[:, j], features_q[n][rows], features_k[j], seen[rows]),
                None if near is None else near[rows],
                feature_map,
                near_is_exact=bool(exact_window),
                far_bias=float(biases[j]),
                tuning=tuning[j],
            )
            found[n].append(figures)
    return {name: np.array([_mean(head, name) for head in found]) for name in found[0][0]}


class _Head(NamedTuple):
    """One head of one sequence: R of its queries, every one of which sees a key."""

    query: np.ndarray
    """(R, H)."""
    key: np.ndarray
    """(S, H)."""
    query_features: np.ndarray
    """(R, M), logarithms if the map returns those."""
    key_features: np.ndarray
    """(S, M), likewise."""
    visible: np.ndarray
    """(R, S)."""


def _compare(
    head: _Head,
    near: np.ndarray | None,
    feature_map: FeatureMap,
    *,
    near_is_exact: bool,
    far_bias: float,
    tuning: tuple[float, np.ndarray] | None,
) -> dict[str, np.ndarray]:
    """The figures of every query, (R,) each; `near` says which pairs are in the window, (R, S)."""
    q, k, query_features, key_features = (x.astype("float64") for x in head[:4])
    far = head.visible
    if near is not None and near_is_exact:
        far = far & ~near
    with np.errstate(divide="ignore", over="ignore"):
        phi_q, offset_q = _scaled(query_features, feature_map.log_space)
        phi_k, offset_k = _scaled(key_features, feature_map.log_space)
        log_kernel = q @ k.T * q.shape[-1] ** -0.5
        log_estimate = np.log(np.maximum(phi_q @ phi_k.T, 0.0)) + offset_q + offset_k.T
        log_exact = log_kernel + np.where(far, far_bias, 0.0)
        log_weights = _log_normalize(np.where(head.visible, log_exact, -np.inf))
        log_layer = np.where(far, log_estimate + far_bias, log_kernel)
        log_layer = _log_normalize(np.where(head.visible, log_layer, -np.inf))
        weights = np.exp(log_weights)
        carried = phi_q * (far @ (phi_k * np.exp(offset_k - offset_k.max())))
        figures = {
            "total_variation": 0.5 * np.abs(weights - np.exp(log_layer)).sum(axis=-1),
            "effective_features": _effective_number(carried),
        }
        if not feature_map.estimates_softmax:
            return figures
        if near is not None:
            figures["window_share"] = np.where(near, weights, 0.0).sum(axis=-1)
        log_weights, weights = np.where(far, log_weights, -np.inf), np.where(far, weights, 0.0)
        # (e^r - 1)^2 w, where e^r may overflow though w makes up for it.
        log_ratio = log_estimate - log_kernel
        error = np.exp(log_weights + 2 * log_ratio) - 2 * np.exp(log_weights + log_ratio) + weights
        figures["measured_relative_variance"] = error.sum(axis=-1)
        if tuning is not None:
            log_moment = _log_second_moment(q, k, log_kernel, *tuning)
            variance = (np.exp(log_weights + log_moment) - weights) / phi_k.shape[-1]
            figures["relative_variance"] = variance.sum(axis=-1)
    return figures


def _tuning(
    feature_map: FeatureMap, num_key_heads: int
) -> Sequence[tuple[float, np.ndarray] | None]:
    """A and Psi (H,) in the formula for the variance, for each key head, or None without one."""
    if feature_map.estimates_softmax and not feature_map.trainable_projection:
        if isinstance(feature_map, FavorPlus):
            return [(0.0, np.ones(1))] * num_key_heads
        if isinstance(feature_map, FavorPlusPlus):
            _, a, *balance = (_to_numpy(x) for x in feature_map.operands(None, None))
            psi = balance[0][:, 0] if balance else np.ones((len(a), 1))
            # One head stands for all if the map was not built for keys (B, S, K, H).
            return list(zip(a[:, 0, 0], psi, strict=True)) * (num_key_heads // len(a))
    return [None] * num_key_heads


def _log_second_moment(
    q: np.ndarray, k: np.ndarray, log_kernel: np.ndarray, a: float, psi: np.ndarray
) -> np.ndarray:
    """The logarithm of M times the relative variance, plus one, of all pairs (R, S)."""
    head_dim = q.shape[-1]
    squares = ((q * psi) ** 2).sum(axis=-1)[:, None] + ((k / psi) ** 2).sum(axis=-1)
    length = squares * head_dim**-0.5 + 2 * log_kernel
    constant = head_dim * (np.log1p(-4 * a) - 0.5 * np.log1p(-8 * a))
    return constant + length * (2 * (1 - 4 * a) / (1 - 8 * a) - 1)


def _scaled(features: np.ndarray, log_space: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features (L, M) as values and the logarithm of their scale (L, 1)."""
    if not log_space:
        return features, np.zeros((len(features), 1))
    largest = features.max(axis=-1, keepdims=True)
    return np.exp(features - largest), largest


def _effective_number(x: np.ndarray) -> np.ndarray:
    """(sum x)^2 / sum x^2 over the last axis, or 0 where x is."""
    x = x / np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.finfo("float64").tiny)
    squares = (x * x).sum(axis=-1)
    return x.sum(axis=-1) ** 2 / np.where(squares > 0, squares, 1.0)


def _log_normalize(logs: np.ndarray) -> np.ndarray:
    """Shift rows so that their exponentials sum to one; a row of zeros stays one."""
    largest = logs.max(axis=-1, keepdims=True)
    shifted = logs - np.where(np.isfinite(largest), largest, 0.0)
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    return shifted - np.log(np.where(total > 0, total, 1.0))


def _features(
    feature_map: FeatureMap, q: np.ndarray, k: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features of one sequence, or logarithms: q (T, N, H), k (S, K, H) -> (N, T, M), (K, S, M)."""
    num_heads, num_key_heads = q.shape[1], k.shape[1]
    grouped = q.reshape(len(q), num_key_heads, num_heads // num_key_heads, q.shape[-1])
    query = ops.convert_to_tensor(grouped.transpose(1, 2, 0, 3)[None])
    key = ops.convert_to_tensor(k.transpose(1, 0, 2)[None])
    operands = feature_map.operands(key, ops.convert_to_tensor(mask.T[None]))
    found = []
    for x, is_query in ((query, True), (key, False)):
        values, offset = feature_map.features(x, operands, is_query=is_query)
        values = _to_numpy(values if offset is None else values + offset)
        found.append(values.reshape(math.prod(values.shape[:-2]), *values.shape[-2:]))
    return found[0], found[1]


def _sample(valid: np.ndarray, mask: np.ndarray, max_tokens: int | None) -> np.ndarray:
    """The queries to look at, ascending."""
    tokens = np.flatnonzero(valid)
    if max_tokens is None:
        return tokens
    count = max(1, max_tokens**2 // max(1, int(mask.any(axis=1).sum())))
    if len(tokens) <= count:
        return tokens
    return np.sort(np.random.default_rng(0).choice(tokens, count, replace=False))


def _near_pairs(
    tokens: np.ndarray, valid: np.ndarray, run: np.ndarray, window: int, num_sinks: int
) -> np.ndarray:
    """Which pairs of `tokens` and a key of one segment are exact, (T, S); see `favor_attention`."""
    index = np.arange(len(run))
    first = np.full(run[-1] + 1, len(run))
    np.minimum.at(first, run[valid], index[valid])
    position = index - first[run]
    block = position // window
    return (np.abs(block[tokens][:, None] - block) <= 1) | (position < num_sinks)


def _mean(figures: list[dict[str, np.ndarray]], name: str) -> float:
    values = np.concatenate([x[name] for x in figures])
    return float(values.mean()) if len(values) else np.nan


def _to_numpy(x: Any) -> np.ndarray:
    return ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(x), "float32"))
