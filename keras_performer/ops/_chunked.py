"""Linear-time implementation of `favor_attention` in `keras.ops`: the portable default.

Tensors are laid out per key/value head: query (B, K, G, T, H), where G query heads share each of
the K key/value heads, key (B, K, S, H), value (B, K, S, V). The rows of a chunk of queries are
R = G*C. A column of ones is appended to the value, so that one product gives the numerator and the
denominator, and masking the value masks both.
"""

from typing import Any

from keras import ops

from keras_performer.ops._chunks import (
    by_chunks,
    by_hand,
    join_rows,
    normalize,
    pad,
    plan,
    reads_run,
    rows_by_steps,
    rows_of_steps,
    run_before,
    same_run,
    split,
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
    most_chunks,
    no_carry,
    read,
    run_edges,
    sums_before,
)

CHUNK = 64
"""Tokens whose pairs are formed, causally."""
_PACKED_CHUNK = 128
"""Tokens a step, and whose pairs are formed, in packed segments: each step keeps two states."""


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
    batch, num_heads, num_groups, length, _ = ops.shape(query)
    most = most_chunks(batch * num_heads * CHUNK * feature_map.feature_dim)
    keys = _key_chunks(key, value, key_mask, *plan(ops.shape(key)[2], CHUNK * most))

    def take_up(carry, x, weights):
        k, v, m = x
        return absorb(carry, v, *key_features(feature_map, k, weights, m)), ()

    carry, _ = scan(take_up, initial_carry(state, key, value, feature_map), keys, operands)
    most = most_chunks(batch * num_heads * num_groups * CHUNK * feature_map.feature_dim)
    size, num_chunks = plan(length, CHUNK * most)
    queries = split_rows(query, size, num_chunks)

    def step(carry, x, weights):
        phi, _ = features(feature_map, x[0], weights[1:], is_query=True)
        return carry, (read(phi, weights[0]),)

    _, (output,) = scan(
        step,
        no_carry(query),
        (queries,),
        (carry[0], *operands),
        output_shapes=[(*ops.shape(queries)[1:-1], value.shape[-1])],
    )
    return join_rows(output, query, size), as_state(carry)


def _causal(query, key, value, feature_map, operands, key_mask, runs, state):
    size, count, num_steps = _plan_causal(query, feature_map)
    keys = _key_chunks(key, value, key_mask, count * size, num_steps)
    num_groups = query.shape[2]
    rows = rows_by_steps(query, size, count, num_steps)
    # A map takes tensors of four axes, so the chunks of a step are told apart after it.
    queries = ops.reshape(rows, (*ops.shape(rows)[:3], -1, query.shape[-1]))
    run_steps = () if runs is None else _run_chunks(runs, count * size, num_steps)
    place = ops.arange(size)
    order = tile_rows(ops.expand_dims(place, -1) >= place, num_groups)

    def attend_chunks(phi_q, phi_k, log_scale, v, sums, scale, *step_runs):
        phi_q = by_chunks(phi_q, num_groups * size)
        phi_k, v = by_chunks(phi_k, size), by_chunks(v, size)
        if log_scale is not None:
            log_scale = by_chunks(log_scale, size)
        visible, gate, run, edges = order, None, None, None
        if step_runs:
            run = ops.reshape(step_runs[0], (-1, count, size))
            edges = run_edges(run, step_runs[1])
            visible = ops.logical_and(order, tile_rows(same_run(run, run), num_groups))
            gate = reads_run(run, edges[:, :-1], num_groups)
        before, carry = sums_before((sums, scale), phi_k, v, log_scale, run, edges)
        weighted = attend_chunk(phi_q, phi_k, log_scale, v, visible, [(*before, gate)])
        return normalize(weighted), *carry

    def step(carry, x, weights):
        q, k, v, m, *step_runs = x
        phi_q, _ = features(feature_map, q, weights, is_query=True)
        phi_k, log_scale = key_features(feature_map, k, weights, m)
        tensors = (phi_q, phi_k, log_scale, v, *carry)
        if log_scale is not None and not step_runs and (hand := by_hand(*tensors)):
            output, *carry = hand.causal_step(
                attend_chunks, phi_q, phi_k, log_scale, v, *carry, count, order
            )
        else:
            output, *carry = attend_chunks(*tensors, *step_runs)
        return tuple(carry), (output,)

    carry, (output,) = scan(
        step,
        initial_carry(state, key, value, feature_map, feature_map.causal_key_sum),
        (queries, *keys, *run_steps),
        operands,
        output_shapes=[(*ops.shape(rows)[1:-1], value.shape[-1])],
    )
    return rows_of_steps(output, query, size), as_state(carry)


def _packed(query, key, value, feature_map, operands, key_mask, runs):
    """Bidirectional attention within segments: pairs in a chunk, states from both sides."""
    size, num_chunks = plan(ops.shape(query)[3], _PACKED_CHUNK)
    keys = _key_chunks(key, value, key_mask, size, num_chunks)
    queries = split_rows(query, size, num_chunks)
    num_groups = query.shape[2]
    run, before = _run_chunks(runs, size, num_chunks)
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
    return join_rows(output, query, size), {}


# Chunks of keys, queries and segments.


def _plan_causal(query, feature_map):
    """Tokens a chunk, chunks a step and number of steps, static or not."""
    batch, num_heads, num_groups, length, _ = ops.shape(query)
    most = most_chunks(batch * num_heads * num_groups * CHUNK * feature_map.feature_dim)
    largest = CHUNK * most
    num_steps = (length + largest - 1) // largest  # a converter may round a negative one up
    if not isinstance(length, int):
        return CHUNK, most, num_steps
    count = -(-length // (CHUNK * num_steps))
    size = -(-length // (count * num_steps))
    return (size if size == length else -(-size // 8) * 8), count, num_steps


def _key_chunks(key, value, key_mask, size, num_chunks):
    """Key (n, B, K, C, H), value with its ones (n, B, K, C, V+1), mask (n, B, K|1, C, 1)."""
    batch, _, length, _ = ops.shape(key)
    if key_mask is None:
        key_mask = ops.ones((batch, 1, length), "bool")
    value, mask = with_ones(value, key_mask), ops.expand_dims(key_mask, -1)
    return tuple(split(pad(x, 2, num_chunks * size), 2, size) for x in (key, value, mask))


def _run_chunks(runs, size, num_chunks):
    """Run indices (n, B, C), and the run (n, B) that the state before each chunk belongs to.

    Padding continues the last run, so that the state at the end is the last segment's.
    """
    padding = size * num_chunks - ops.shape(runs)[1]
    if not (isinstance(padding, int) and padding == 0):
        last = ops.broadcast_to(runs[:, -1:], (ops.shape(runs)[0], padding))
        runs = ops.concatenate([runs, last], axis=1)
    chunks = split(runs, 1, size)
    return chunks, run_before(chunks)
