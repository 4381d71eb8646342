"""Linear-time implementation of `favor_attention` in `keras.ops`: the portable default.

Tensors are laid out per key/value head: query (B, K, G, T, H), where G query heads share each of
the K key/value heads, key (B, K, S, H), value (B, K, S, V). The rows of a chunk of queries are
R = G*C. A column of ones is appended to the value, so that one product gives the numerator and the
denominator, and masking the value masks both.
"""

from typing import Any

from keras import ops

from keras_performer.ops._chunks import (
    cut,
    join_rows,
    normalize,
    plan,
    reads_run,
    run_before,
    same_run,
    split_rows,
    tile_rows,
    with_ones,
)
from keras_performer.ops._scan import carries_of, scan
from keras_performer.ops._sums import (
    absorb,
    as_state,
    attend_chunk,
    features,
    initial_carry,
    keep_run,
    key_features,
    no_carry,
)

CHUNK = 128
"""Tokens a step when pairs within a chunk are formed (causal, or packed segments)."""
WIDE_CHUNK = 256
"""Tokens a step when only the state is built or read."""


def why_not(*, exact_window: int | None, **options: Any) -> str | None:
    """Say in one sentence why this implementation cannot run, or return None."""
    del options
    if exact_window:
        return (
            "implementation='chunked' has no exact near field: take 'windowed', or leave "
            f"exact_window=None. Received: exact_window={exact_window}."
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

    def take_up(carry, x, weights):
        k, v, m = x
        return absorb(carry, v, *key_features(feature_map, k, weights, m)), ()

    carry, _ = scan(take_up, initial_carry(state, key, value, feature_map), keys, operands)
    queries, length = _query_chunks(query, WIDE_CHUNK)

    def read(carry, x, weights):
        phi, _ = features(feature_map, x[0], weights[1:], is_query=True)
        return carry, (normalize(ops.matmul(phi, weights[0])),)

    _, (output,) = scan(
        read,
        no_carry(query),
        (queries,),
        (carry[0], *operands),
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return join_rows(output, query, length), as_state(carry)


def _causal(query, key, value, feature_map, operands, key_mask, runs, state):
    keys = _key_chunks(key, value, key_mask, CHUNK)
    queries, length = _query_chunks(query, CHUNK)
    num_groups = query.shape[2]
    run_chunks = () if runs is None else _run_chunks(runs, CHUNK)

    def step(carry, x, weights):
        q, k, v, m, *chunk_runs = x
        phi_q, _ = features(feature_map, q, weights, is_query=True)
        phi_k, log_scale = key_features(feature_map, k, weights, m)
        size = k.shape[2]
        position = ops.expand_dims(ops.arange(size), (0, 1, 2))
        visible = ops.swapaxes(position, -1, -2) >= position
        reads_state = None
        if chunk_runs:
            run, state_run = chunk_runs
            visible = ops.logical_and(visible, same_run(run, run))
            reads_state = reads_run(run, state_run, num_groups)
        weighted = attend_chunk(
            phi_q, phi_k, log_scale, v, tile_rows(visible, num_groups), [(*carry, reads_state)]
        )
        if chunk_runs:
            carry, v, log_scale = keep_run(carry, v, log_scale, run, state_run, run[:, -1])
        return absorb(carry, v, phi_k, log_scale), (normalize(weighted),)

    carry, (output,) = scan(
        step,
        initial_carry(state, key, value, feature_map, feature_map.causal_key_sum),
        (queries, *keys, *run_chunks),
        operands,
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return join_rows(output, query, length), as_state(carry)


def _packed(query, key, value, feature_map, operands, key_mask, runs):
    """Bidirectional attention within segments: pairs in a chunk, states from both sides."""
    keys = _key_chunks(key, value, key_mask, CHUNK)
    queries, length = _query_chunks(query, CHUNK)
    num_groups = query.shape[2]
    run, before = _run_chunks(runs, CHUNK)
    after = ops.concatenate([run[1:, :, 0], run[-1:, :, -1]], axis=0)
    empty = initial_carry(None, key, value, feature_map)

    def absorb_towards(edge):
        def step(carry, x, weights):
            k, v, m, run, neighbour = x
            phi, log_scale = key_features(feature_map, k, weights, m)
            kept, v, log_scale = keep_run(carry, v, log_scale, run, neighbour, run[:, edge])
            return absorb(kept, v, phi, log_scale)

        return step

    prefix = carries_of(absorb_towards(-1), empty, (*keys, run, before), operands)
    suffix = carries_of(absorb_towards(0), empty, (*keys, run, after), operands, reverse=True)

    def step(carry, x, weights):
        q, k, v, m, run, before, after, *states = x
        phi_q, _ = features(feature_map, q, weights, is_query=True)
        phi_k, log_scale = key_features(feature_map, k, weights, m)
        reads = [
            (*states[:2], reads_run(run, before, num_groups)),
            (*states[2:], reads_run(run, after, num_groups)),
        ]
        weighted = attend_chunk(
            phi_q, phi_k, log_scale, v, tile_rows(same_run(run, run), num_groups), reads
        )
        return carry, (normalize(weighted),)

    _, (output,) = scan(
        step,
        no_carry(query),
        (queries, *keys, run, before, after, *prefix, *suffix),
        operands,
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return join_rows(output, query, length), {}


# Chunks of keys, queries and segments.


def _key_chunks(key, value, key_mask, largest):
    """Key (n, B, K, C, H), value with its ones (n, B, K, C, V+1), mask (n, B, K|1, C, 1)."""
    batch, _, length, _ = ops.shape(key)
    if key_mask is None:
        key_mask = ops.ones((batch, 1, length), "bool")
    value, mask = with_ones(value, key_mask), ops.expand_dims(key_mask, -1)
    return cut(key, 2, largest), cut(value, 2, largest), cut(mask, 2, largest)


def _query_chunks(query, largest):
    """Query rows (n, B, K, G*C, H) and the padded chunk length."""
    size, num_chunks = plan(ops.shape(query)[3], largest)
    return split_rows(query, size, num_chunks), size


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
    return chunks, run_before(chunks)
