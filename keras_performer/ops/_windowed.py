"""Linear-time implementation of `favor_attention` with an exact near field, in `keras.ops`.

The layout is that of `_chunked`. Queries are cut into tiles. The near keys of a tile are its own
and those within 2 W slots of it, wherever the grid of blocks lies. Each pair of them is weighed
exactly if it is near and through its features if not, and a state stands for all keys beyond. Exact
scores and features share one row maximum.
"""

from typing import Any

from keras import ops

from keras_performer.ops._chunks import (
    LOG_ZERO,
    exp,
    hide,
    is_one,
    normalize,
    overlapping,
    part,
    reads_run,
    rows_by_steps,
    rows_of_steps,
    run_before,
    same_run,
    tile_rows,
    with_ones,
)
from keras_performer.ops._near_field import NearField, sinks_before
from keras_performer.ops._scan import carries_of, scan
from keras_performer.ops._sums import (
    absorb,
    as_state,
    features,
    initial_carry,
    keep_run,
    key_features,
    most_chunks,
    no_carry,
    run_edges,
    sums_before,
)

_SMALLEST_TILE = 128
_SMALLEST_CAUSAL_TILE = 32
_LARGEST_CAUSAL_TILE = 128  # the scores of larger ones leave the caches
_WITHOUT_HEADS = ("position", "stays", "run")


def why_not(*, exact_window: int | None, **options: Any) -> str | None:
    """Say in one sentence why this implementation cannot run, or return None."""
    del options
    if exact_window:
        return None
    return "implementation='windowed' is for an exact near field: set exact_window."


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
    """Compute attention in O(T (W (H + V + M) + M (H + V))) time and memory linear in T.

    Args:
        query: (B, K, G, T, H).
        key: (B, K, S, H), zero where masked, for S = front + T slots.
        value: (B, K, S, V), zero where masked.
        feature_map: The map; `features` is called on tiles.
        operands: Tensors that `features` needs.
        causal: Whether query t sees keys up to slot front + t only.
        key_mask: Boolean (B, K or 1, S).
        runs: None or integers (B, S): the index of each token's segment. The state belongs to 0.
        state: None or the features of keys seen before.
        near: Positions and sinks.

    Returns:
        The output (B, K, G, T, V) and, causally, the state of the keys that left the window;
        otherwise an empty one.
    """
    walk = _causal if causal else _bidirectional
    return walk(query, key, value, feature_map, operands, key_mask, runs, state, near)


def _causal(query, key, value, feature_map, operands, key_mask, runs, state, near):
    length, num_groups = ops.shape(query)[3], query.shape[2]
    size, count, num_steps = _plan_causal(query, feature_map, near)
    single = is_one(count) and is_one(num_steps)
    reach = 0 if single and not near.front else 2 * near.window
    sees_all = _sees_all_exactly(length, near)
    tiles = _tiles(key, value, key_mask, runs, near, size, num_steps * count, reach, 0)
    arrays = _by_steps(tiles, count)
    if runs is not None:
        arrays["state_run"] = run_before(arrays["run"][:, :, -1], size - 1)
    arrays["query"] = rows_by_steps(query, size, count, num_steps)
    rows = ops.expand_dims(ops.arange(reach, reach + size), -1)
    causal = rows >= ops.arange(reach + size)

    def step(carry, xs, weights):
        tile = dict(zip(arrays, xs, strict=True))
        # A single token sees its window exactly: what has left it is in the state.
        keys: Any = None if sees_all or is_one(length) else _features(tile, feature_map, weights)
        reads = []
        if not sees_all:
            edges: Any = None if runs is None else ops.expand_dims(tile["state_run"], -1)
            if single:  # its keys are taken up behind the walk
                before = tuple(ops.expand_dims(x, 2) for x in carry)
            else:
                leaving = _part(tile, 0, size)
                phi, log_scale = (part(x, 3, 0, size) for x in keys)
                if runs is not None:
                    edges = run_edges(leaving["run"], tile["state_run"])
                far = _far(leaving, near, log_scale)
                before, carry = sums_before(carry, phi, *far, leaving.get("run"), edges)
            gate = None
            if runs is not None:
                gate = reads_run(tile["run"][:, :, reach:], edges[:, :count], num_groups)
            reads = [(*before, gate)]
        queries = slice(reach, None)
        output = _attend_tiles(
            tile, feature_map, weights, near, num_groups, queries, causal, reads, keys
        )
        return carry, (output,)

    carry, (output,) = scan(
        step,
        initial_carry(state, key, value, feature_map),
        tuple(arrays.values()),
        operands,
        output_shapes=[(*ops.shape(arrays["query"])[1:-1], value.shape[-1])],
    )
    if near.stays is not None:
        # No tile took up the last slots, which may have left the window all the same.
        last = _by_steps({name: x[-1:] for name, x in tiles.items()}, 1)
        start, carried = (0 if single else size), None
        if runs is not None:
            carried = arrays["state_run"][0] if single else last["run"][0, :, 0, size - 1]
        rest = _part({name: x[0] for name, x in last.items()}, start, size + reach - start)
        carry = _take_up(carry, rest, feature_map, operands, near, carried, -1)
    return rows_of_steps(output, query, size), as_state(carry)


def _bidirectional(query, key, value, feature_map, operands, key_mask, runs, state, near):
    length, num_groups = ops.shape(query)[3], query.shape[2]
    # The sinks of a sequence that begins at a tile's end lie in the next one, and in no sums.
    beside = max(2 * near.window, near.num_sinks)
    size, num_tiles = _plan(length, beside)
    reach = 0 if is_one(num_tiles) else beside
    sees_all = _sees_all_exactly(length, near)
    arrays = _by_steps(_tiles(key, value, key_mask, runs, near, size, num_tiles, reach, reach), 1)
    if runs is not None:
        run = arrays["run"][:, :, 0]
        arrays["before"] = run_before(run, size - 1)
        arrays["after"] = ops.concatenate([run[1:, :, -size], run[-1:, :, -1]], axis=0)
    initial = initial_carry(state, key, value, feature_map)
    states = {}
    if not is_one(num_tiles):
        names = [name for name in arrays if not name.startswith("sink")]

        def take_up(side):
            start, edge = (0, -1) if side == "before" else (2 * reach, 0)

            def step(carry, xs, weights):
                tile = dict(zip(names, xs, strict=True))
                keys, carried = _part(tile, start, size), tile.get(side)
                return _take_up(carry, keys, feature_map, weights, near, carried, edge)

            return step

        xs = tuple(arrays[name] for name in names)
        empty = initial_carry(None, key, value, feature_map)
        for side, start in (("before", initial), ("after", empty)):
            sums, scale = carries_of(take_up(side), start, xs, operands, reverse=side == "after")
            states |= {f"{side}_sums": sums, f"{side}_scale": scale}
    elif state is not None:
        sums, scale = (ops.expand_dims(x, 0) for x in initial)
        states = {"before_sums": sums, "before_scale": scale}
    arrays = {**arrays, **states, "query": rows_by_steps(query, size, 1, num_tiles)}
    everything = ops.ones((1, 1), "bool")

    def step(carry, xs, weights):
        tile = dict(zip(arrays, xs, strict=True))
        queries, reads = slice(reach, reach + size), []
        for side in ("before", "after"):
            if f"{side}_sums" not in tile:
                continue
            gate = None
            if runs is not None:
                run = ops.expand_dims(tile[side], -1)
                gate = reads_run(tile["run"][:, :, queries], run, num_groups)
            read = (ops.expand_dims(tile[f"{side}_{what}"], 2) for what in ("sums", "scale"))
            reads.append((*read, gate))
        keys = None if sees_all else _features(tile, feature_map, weights)
        output = _attend_tiles(
            tile, feature_map, weights, near, num_groups, queries, everything, reads, keys
        )
        return carry, (output,)

    _, (output,) = scan(
        step,
        no_carry(query),
        tuple(arrays.values()),
        operands,
        output_shapes=[(*ops.shape(arrays["query"])[1:-1], value.shape[-1])],
    )
    return rows_of_steps(output, query, size), {}


def _attend_tiles(
    tile, feature_map, operands, near, num_groups, queries, order, reads, keys
) -> Any:
    """The output (B, K, E, R, V) of a step's queries.

    `queries` are their slots in a tile, `order` (C or 1, L or 1) what they may see by their order,
    each read is (sums, log scale, boolean gate (B, 1, E, R, 1) or None), and `keys` are features
    and log scale of a tile's keys, or None if every pair is exact.
    """
    query, key, value, position = (tile[n] for n in ("query", "key", "value", "position"))
    visible = ops.logical_and(order, ops.expand_dims(tile["mask"], -2))
    if "run" in tile:
        visible = ops.logical_and(visible, same_run(tile["run"][:, :, queries], tile["run"]))
    exact = near.is_exact(position[:, :, queries], position)
    near_pairs = tile_rows(ops.logical_and(visible, exact), num_groups)
    near_key, near_value = key, value
    if "sink_key" in tile:
        sees_sinks = ops.expand_dims(tile["sink_mask"], -2)
        if "run" in tile:
            first = tile["run"][:, :, :1]
            sees_sinks = ops.logical_and(sees_sinks, same_run(tile["run"][:, :, queries], first))
        sees_sinks = ops.broadcast_to(
            tile_rows(sees_sinks, 1 if "run" not in tile else num_groups),
            (*ops.shape(near_pairs)[:4], near.num_sinks),
        )
        near_pairs = ops.concatenate([near_pairs, sees_sinks], axis=-1)
        near_key = ops.concatenate([key, tile["sink_key"]], axis=3)
        near_value = ops.concatenate([value, tile["sink_value"]], axis=3)
    logits = ops.matmul(query * query.shape[-1] ** -0.5, ops.swapaxes(near_key, -1, -2))
    logits = hide(logits, near_pairs)
    row_max = ops.maximum(ops.max(logits, axis=-1, keepdims=True), LOG_ZERO / 2)
    phi_q = log_q = far = None
    scales = []
    if keys or reads:
        phi_q, log_q = features(feature_map, query, operands, is_query=True)
    if keys:
        far = ops.logical_and(visible, ops.logical_not(exact))
        far = hide(log_q + ops.swapaxes(keys[1], -1, -2), tile_rows(far, num_groups))
        row_max = ops.maximum(row_max, ops.max(far, axis=-1, keepdims=True))
    for _, scale, gate in reads:
        scale = log_q + scale
        scales.append(scale if gate is None else ops.where(gate, scale, LOG_ZERO))
        row_max = ops.maximum(row_max, scales[-1])
    row_max = ops.stop_gradient(row_max)
    total = ops.matmul(exp(logits - row_max), near_value)
    if keys:
        scores = ops.matmul(phi_q, ops.swapaxes(keys[0], -1, -2))
        total = total + ops.matmul(scores * exp(far - row_max), value)
    for (sums, _, _), scale in zip(reads, scales, strict=True):
        total = total + exp(scale - row_max) * ops.matmul(phi_q, sums)
    return normalize(total)


def _features(tile, feature_map, operands):
    """Features and log scale of a tile's keys."""
    mask = ops.expand_dims(tile["mask"], -1)
    return key_features(feature_map, tile["key"], operands, mask)


def _far(tile, near, log_scale):
    """Values and log scales of the keys that no query behind them sees exactly."""
    value = tile["value"]
    left_out = near.is_sink(tile["position"]) if near.num_sinks else None
    if "stays" in tile:
        stays = tile["stays"]
        left_out = stays if left_out is None else ops.logical_or(left_out, stays)
    if left_out is not None:
        left_out = ops.expand_dims(left_out, (1, -1))
        value = ops.where(left_out, 0.0, value)
        log_scale = ops.where(left_out, LOG_ZERO, log_scale)
    return value, log_scale


def _take_up(carry, tile, feature_map, operands, near, carried_run, edge):
    """Add to the sums those keys of a single tile.

    With segments the sums become those of the run at the slot `edge`, after those of `carried_run`.
    """
    phi, log_scale = _features(tile, feature_map, operands)
    value, log_scale = _far(tile, near, log_scale)
    phi, value, log_scale = (ops.squeeze(x, 2) for x in (phi, value, log_scale))
    if carried_run is not None:
        run = ops.squeeze(tile["run"], 1)
        carry, value, log_scale = keep_run(carry, value, log_scale, run, carried_run, run[:, edge])
    return absorb(carry, value, phi, log_scale)


def _plan_causal(query, feature_map, near):
    """Tokens a tile, tiles a step and number of steps."""
    batch, num_heads, num_groups, length, _ = ops.shape(query)
    reach = 2 * near.window
    size = min(max(_SMALLEST_CAUSAL_TILE, reach), _LARGEST_CAUSAL_TILE)
    if isinstance(length, int) and length <= size:
        return length, 1, 1
    columns = max(size + reach, feature_map.feature_dim)
    most = most_chunks(batch * num_heads * num_groups * size * columns)
    num_steps = (length + size * most - 1) // (size * most)
    if not isinstance(length, int):
        return size, most, num_steps
    return size, -(-length // (size * num_steps)), num_steps


def _plan(length, beside):
    """Tokens a tile and number of tiles. Several have at least the tokens that lie beside each."""
    size = max(_SMALLEST_TILE, beside)
    if not isinstance(length, int):
        return size, (length + size - 1) // size
    return (length, 1) if length <= size else (size, -(-length // size))


def _sees_all_exactly(length, near):
    """Whether every pair is near, known before the tensors are."""
    return isinstance(length, int) and not near.front and length <= near.window


def _tiles(key, value, key_mask, runs, near, size, num_tiles, before, after):
    """Tiles of keys, each with `before` slots to its left and `after` to its right.

    Returns:
        By name: key (n, B, K, L, H), value (n, B, K, L, V+1), mask (n, B, K or 1, L), position
        (n, B, L), and where they are needed stays and run (n, B, L), sink_key (n, B, K, s, H),
        sink_value and sink_mask: the sinks of the sequence at the tile's first slot that lie before
        it.
    """
    lead = before - near.front  # the state's slots are those before the first tile

    def tiles(x, axis):
        return overlapping(x, axis, size, num_tiles, lead=lead, before=before, after=after)

    arrays = {
        "key": tiles(key, 2),
        "value": tiles(with_ones(value, key_mask), 2),
        "mask": tiles(key_mask, 2),
        "position": tiles(near.positions, 1),
    }
    if near.stays is not None:
        arrays["stays"] = tiles(near.stays, 1)
    if runs is not None:
        # Padding continues the last run, so that the sums at the end are the last segment's.
        end = near.front + num_tiles * size + after
        more = ops.broadcast_to(runs[:, -1:], (ops.shape(runs)[0], end))
        arrays["run"] = tiles(ops.concatenate([runs, more], axis=1)[:, :end], 1)
    # Before a single tile lies only what a state remembers.
    if near.num_sinks and not (is_one(num_tiles) and near.sinks is None):
        slots = ops.expand_dims(ops.arange(num_tiles, dtype="int32") * size - lead, 0)
        slots = ops.clip(slots, 0, ops.shape(near.positions)[1] - 1)
        sink_key, sink_value, sink_mask = sinks_before(near, key, value, key_mask, slots)
        sink_value = with_ones(sink_value, sink_mask)
        arrays |= {"sink_key": sink_key, "sink_value": sink_value, "sink_mask": sink_mask}
    return arrays


def _by_steps(tiles, count):
    """Give tiles an axis of E = `count` tiles a step, behind the heads."""

    def by_steps(name, x):
        axis = 1 if name in _WITHOUT_HEADS else 2
        shape = ops.shape(x)
        x = ops.reshape(x, (shape[0] // count, count, *shape[1:]))
        return ops.moveaxis(x, 1, axis + 1)

    return {name: by_steps(name, x) for name, x in tiles.items()}


def _part(tile, start, length):
    """Some slots of tiles' keys."""
    found = {name: part(tile[name], 3, start, length) for name in ("key", "value", "mask")}
    for name in _WITHOUT_HEADS:
        if name in tile:
            found[name] = part(tile[name], 2, start, length)
    return found
