"""Exact softmax attention within a band, in linear time."""

from typing import Any

from keras import ops

from keras_performer.ops._chunks import (
    LOG_ZERO,
    dtype_of,
    exp,
    hide,
    join_rows,
    normalize,
    overlapping,
    pad,
    run_indices,
    same_run,
    split,
    split_rows,
    tile_rows,
    with_ones,
)
from keras_performer.ops._inputs import (
    by_key_heads,
    check_key_mask,
    check_segment_ids,
    check_shapes,
    group_queries,
    ungroup,
    wide_dtype,
    without_autocast,
)
from keras_performer.ops._scan import scan

_SMALLEST_BLOCK = 64


@without_autocast
def sliding_window_attention(
    query: Any,
    key: Any,
    value: Any,
    sliding_window: int,
    *,
    causal: bool = False,
    key_mask: Any = None,
    segment_ids: Any = None,
) -> Any:
    """Softmax attention of query t over the keys s with |t - s| < sliding_window.

    Blocks of queries meet their own block of keys and its neighbours, and the band is cut out of
    the pairs between them.

    **Shapes and args** query (B, T, N, H), key (B, S, K, H), value (B, S, K, V); K divides N.
    `key_mask` is boolean (B, S) or (B, K, S); `segment_ids` are integers (B, T) with T = S, and
    tokens attend within their run of equal ids; `causal` also asks for s <= t.

    **Returns** (B, T, N, V), of the type of `query`.

    **Masking** A query that sees no key gives zeros.

    **Precision** float32 whatever the input type, float64 for float64; see `favor_attention`.

    **Cost** O(T N W (H + V)) time with W = max(sliding_window, 64), and O(T N (H + V)) memory.

    **Raises** ValueError for a window that is not a positive integer; ValueError or TypeError for
    shapes and types that cannot work.

    **Example**

    >>> x = np.ones((1, 5, 2, 8), "float32")
    >>> tuple(sliding_window_attention(x, x, x, 2, causal=True).shape)
    (1, 5, 2, 8)

    **Source** Beltagy et al. 2020, arXiv 2004.05150, section 3.1; the band is that of
    `keras.layers.MultiHeadAttention(sliding_window=...)`.
    """
    if not isinstance(sliding_window, int) or sliding_window < 1:
        raise ValueError(
            "sliding_window must be a positive integer. "
            f"Received: sliding_window={sliding_window!r}"
        )
    query, key, value = (ops.convert_to_tensor(t) for t in (query, key, value))
    check_shapes(query, key, value, False, segment_ids is not None)
    segment_ids = check_segment_ids(segment_ids, query)
    key_mask = check_key_mask(key_mask, key)
    output_dtype, dtype = dtype_of(query), wide_dtype(query)
    length, (batch, key_length) = ops.shape(query)[1], ops.shape(key)[:2]
    query = group_queries(ops.cast(query, dtype) * query.shape[3] ** -0.5, key.shape[2])
    num_groups = query.shape[2]
    key, value = (by_key_heads(ops.cast(t, dtype), key_mask) for t in (key, value))
    if key_mask is None:
        key_mask = ops.ones((batch, 1, key_length), "bool")
    value, mask = with_ones(value, key_mask), ops.expand_dims(key_mask, -1)

    longest = length if causal else ops.maximum(length, key_length)
    if isinstance(length, int) and isinstance(key_length, int):
        longest = length if causal else max(length, key_length)
    size = max(sliding_window, _SMALLEST_BLOCK)
    size = min(size, longest) if isinstance(longest, int) else size
    num_blocks = (longest + size - 1) // size
    total = num_blocks * size
    queries = split_rows(query, size, num_blocks)

    def neighbours(x: Any, axis: int) -> Any:
        """Blocks of keys beside their neighbours: (n, ..., 2 or 3 blocks, ...)."""
        if causal:
            x = x[(slice(None),) * axis + (slice(None, total),)]  # no query sees later keys
        after = 0 if causal else size
        return overlapping(x, axis, size, num_blocks, lead=size, before=size, after=after)

    position = ops.expand_dims(ops.arange(size) + size, -1)
    distance = position - ops.expand_dims(ops.arange(size * (2 if causal else 3)), 0)
    band = ops.abs(distance) < sliding_window
    if causal:
        band = ops.logical_and(band, distance >= 0)
    band = tile_rows(ops.expand_dims(band, (0, 1)), num_groups)
    xs = [queries, *(neighbours(x, 2) for x in (key, value, mask))]
    if segment_ids is not None:
        runs = run_indices(segment_ids) + 1
        xs += [split(pad(runs, 1, total), 1, size), neighbours(runs, 1)]

    def attend(carry: Any, x: Any, weights: Any) -> Any:
        q, k, v, m, *runs = x
        visible = ops.logical_and(band, ops.swapaxes(m, -1, -2))
        if runs:
            visible = ops.logical_and(visible, tile_rows(same_run(*runs), num_groups))
        scores = hide(ops.matmul(q, ops.swapaxes(k, -1, -2)), visible)
        row_max = ops.maximum(ops.max(scores, axis=-1, keepdims=True), LOG_ZERO / 2)
        scores = exp(scores - ops.stop_gradient(row_max))
        return carry, (normalize(ops.matmul(scores, v)),)

    _, (output,) = scan(
        attend,
        (ops.zeros((1,), dtype),),
        tuple(xs),
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[3] - 1)],
    )
    return ops.cast(ungroup(join_rows(output, query, size)), output_dtype)
