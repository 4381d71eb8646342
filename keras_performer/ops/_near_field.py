"""The exact near field: which pairs are near, and what a state carries of it.

A token's position counts from the first unmasked token of its sequence (its row, or its segment).
Blocks of `window` positions see their own and the neighbouring blocks exactly (causally, their own
and the one before); the first `num_sinks` positions are seen exactly by every query. So the grid of
blocks moves with the sequence, and padding, packing and splitting change nothing.

A causal state keeps the last 2 W tokens up to each row's last unmasked one, in slots aligned to the
right. Those that the next token would not see exactly are masked: they are in the sums.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_performer.ops._chunks import dtype_of


class NearField(NamedTuple):
    """What an implementation needs to know, for keys with the state's window before them."""

    window: int
    """Tokens a block."""
    num_sinks: int
    """Leading positions that every query sees exactly."""
    front: int
    """Slots of the state before the first query: 0 or 2 W."""
    unmasked: bool
    """Whether no mask was given, so that every row begins at its first slot."""
    positions: Any
    """(B, front + T), from the first unmasked token on; negative before it."""
    sinks: tuple[Any, Any, Any] | None
    """The state's sink keys (B, K, s, H), values (B, K, s, V) and mask (B, K, s)."""
    stays: Any
    """None, or whether the returned state keeps a key in its window: boolean (B, front + T)."""
    ending: Any
    """None, or for a state to return each row's last slot (B,) and the position after it (B,)."""

    def is_exact(self, query_positions: Any, key_positions: Any) -> Any:
        """Whether pairs of a sequence are near: (B, ..., L), (B, ..., L') -> (B, 1, ..., L, L').

        Causal visibility is left to the caller; it never sees a later block.
        """
        query_block = ops.floor_divide(query_positions, self.window)
        key_block = ops.floor_divide(key_positions, self.window)
        apart = ops.expand_dims(query_block, -1) - ops.expand_dims(key_block, -2)
        exact = ops.abs(apart) <= 1
        if self.num_sinks:
            exact = ops.logical_or(exact, ops.expand_dims(self.is_sink(key_positions), -2))
        return ops.expand_dims(exact, 1)

    def is_sink(self, positions: Any) -> Any:
        """Whether positions are among the first `num_sinks` of their sequence."""
        return ops.logical_and(positions >= 0, positions < self.num_sinks)


class _BiasedMap:
    """A feature map whose keys weigh exp(bias) times as much; the bias is its last operand."""

    def __init__(self, feature_map: Any):
        self._unbiased = feature_map

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unbiased, name)

    def features(self, x: Any, operands: tuple[Any, ...], *, is_query: bool) -> tuple[Any, Any]:
        """See `FeatureMap.features`."""
        values, offset = self._unbiased.features(x, operands[:-1], is_query=is_query)
        if is_query:
            return values, offset
        return values, offset + ops.reshape(operands[-1], (-1, *(1 for _ in x.shape[2:])))


def with_bias(feature_map: Any, operands: tuple[Any, ...], bias: Any, dtype: str) -> Any:
    """A feature map and its operands with a bias (K,) on what is not near, or None for none."""
    if bias is None:
        return feature_map, operands
    return _BiasedMap(feature_map), (*operands, ops.cast(bias, dtype))


def begin(
    key: Any,
    value: Any,
    key_mask: Any,
    runs: Any,
    state: dict[str, Any] | None,
    *,
    window: int,
    num_sinks: int,
    return_state: bool,
) -> tuple[NearField, Any, Any, Any, Any]:
    """Put the window of a causal state before the keys.

    Args:
        key: (B, K, T, H), zero where masked.
        value: (B, K, T, V).
        key_mask: None or boolean (B, K or 1, T).
        runs: None or integers (B, T); the state belongs to 0.
        state: None or a state with a window.
        window: W.
        num_sinks: s.
        return_state: Whether a state will be asked of `finish`.

    Returns:
        The near field, and key, value, key mask (B, K or 1, S) and runs for S = front + T slots.
    """
    batch, num_heads, length, _ = ops.shape(key)
    unmasked = key_mask is None
    if unmasked:
        key_mask = ops.ones((batch, 1, length), "bool")
    start = None if state is None else state["window_position"]
    positions = positions_of(ops.any(key_mask, axis=1), runs, start)
    front, sinks = 0, None
    if state is not None:
        front = 2 * window
        key = ops.concatenate([state["window_key"], key], axis=2)
        value = ops.concatenate([state["window_value"], value], axis=2)
        key_mask = ops.broadcast_to(key_mask, (batch, num_heads, length))
        key_mask = ops.concatenate([state["window_mask"], key_mask], axis=2)
        before = ops.expand_dims(start, -1) + ops.arange(-front, 0, dtype="int32")
        positions = ops.concatenate([before, positions], axis=1)
        if runs is not None:
            runs = ops.concatenate([ops.zeros_like(before), runs], axis=1)
        if num_sinks:
            sinks = (state["sink_key"], state["sink_value"], state["sink_mask"])
    near = NearField(window, num_sinks, front, unmasked, positions, sinks, None, None)
    if return_state:
        belongs, last, following = _ending(near, key_mask, runs)
        # The first position that the next token sees in its own and the last block.
        first_kept = (ops.floor_divide(following, window) - 1) * window
        kept = ops.logical_or(positions >= ops.expand_dims(first_kept, -1), near.is_sink(positions))
        near = near._replace(stays=ops.logical_and(belongs, kept), ending=(last, following))
    return near, key, value, key_mask, runs


def finish(near: NearField, key: Any, value: Any, key_mask: Any) -> dict[str, Any]:
    """What the returned state holds beside the sums: window, sinks and position."""
    last, following = near.ending
    slots = ops.expand_dims(last + 1, -1) + ops.arange(-2 * near.window, 0, dtype="int32")
    inside = slots >= 0
    slots = ops.maximum(slots, 0)
    kept = ops.logical_and(inside, ops.take_along_axis(near.stays, slots, axis=1))
    state = {
        "window_key": take_slots(key, slots),
        "window_value": take_slots(value, slots),
        "window_mask": ops.logical_and(
            _mask_of_heads(take_slots(key_mask, slots), key), ops.expand_dims(kept, 1)
        ),
        "window_position": following,
    }
    if near.num_sinks:
        at_last = ops.expand_dims(last, -1)
        sinks = sinks_before(near, key, value, key_mask, at_last, all_of_them=True)
        state["sink_key"], state["sink_value"], mask = (ops.squeeze(x, 0) for x in sinks)
        seen = ops.arange(near.num_sinks, dtype="int32") < ops.expand_dims(following, -1)
        state["sink_mask"] = ops.logical_and(_mask_of_heads(mask, key), ops.expand_dims(seen, 1))
    return state


def sinks_before(
    near: NearField,
    key: Any,
    value: Any,
    key_mask: Any,
    slots: Any,
    all_of_them: bool = False,
) -> tuple[Any, Any, Any]:
    """The sink keys of the sequences at `slots` (B or 1, n) that lie before those slots.

    Returns:
        Keys (n, B, K, s, H), values (n, B, K, s, V) and mask (n, B, K or 1, s). With `all_of_them`
        those at the slots and behind are not masked.
    """
    batch = ops.shape(key)[0]
    slots = ops.broadcast_to(slots, (batch, ops.shape(slots)[1]))
    num_slots, count = ops.shape(slots)[1], near.num_sinks
    first = slots - ops.take_along_axis(near.positions, slots, axis=1)
    places = ops.expand_dims(first, -1) + ops.arange(count, dtype="int32")
    before = ops.logical_or(places < ops.expand_dims(slots, -1), all_of_them)
    # A place before the first slot is one that only the state remembers.
    if near.sinks is None:
        index = places
    else:
        key, value, key_mask = (
            ops.concatenate([kept, new], axis=2)
            for kept, new in zip(
                near.sinks, (key, value, _mask_of_heads(key_mask, key)), strict=True
            )
        )
        index = ops.where(places < 0, ops.arange(count, dtype="int32"), places + count)
    index = ops.clip(index, 0, ops.shape(key)[2] - 1)
    index = ops.reshape(index, (batch, num_slots * count))

    def take(x: Any) -> Any:
        taken = take_slots(x, index)
        shape = (*ops.shape(x)[:2], num_slots, count, *x.shape[3:])
        order = (2, 0, 1, *range(3, len(shape)))
        return ops.transpose(ops.reshape(taken, shape), order)

    mask = ops.logical_and(take(key_mask), ops.expand_dims(ops.transpose(before, (1, 0, 2)), 2))
    return take(key), take(value), mask


def take_slots(x: Any, slots: Any) -> Any:
    """Take `slots` (B, L) of axis 2 of (B, K, S, ...)."""
    shape = (ops.shape(slots)[0], 1, ops.shape(slots)[1], *(1 for _ in x.shape[3:]))
    index = ops.reshape(slots, shape)
    if dtype_of(x) == "bool":
        return ops.cast(ops.take_along_axis(ops.cast(x, "int32"), index, axis=2), "bool")
    return ops.take_along_axis(x, index, axis=2)


def remembered(state: dict[str, Any], window: int) -> tuple[Any, Any, Any]:
    """The keys (B, K, L, H), values and mask (B, K, L) of a state that its sums leave out."""
    if "sink_key" not in state:
        return state["window_key"], state["window_value"], state["window_mask"]
    # A sink that still has a slot in the window counts once.
    sinks = ops.arange(ops.shape(state["sink_mask"])[2], dtype="int32")
    gone = ops.expand_dims(sinks < ops.expand_dims(state["window_position"] - 2 * window, -1), 1)
    masks = (state["window_mask"], ops.logical_and(state["sink_mask"], gone))
    return (
        ops.concatenate([state["window_key"], state["sink_key"]], axis=2),
        ops.concatenate([state["window_value"], state["sink_value"]], axis=2),
        ops.concatenate(masks, axis=2),
    )


def positions_of(mask: Any, runs: Any, start: Any) -> Any:
    """Positions (B, T) by the mask (B, T), after the `start` (B,) tokens of a state."""
    batch, length = ops.shape(mask)
    index = ops.expand_dims(ops.arange(length, dtype="int32"), 0)
    if runs is None:
        first = ops.cast(ops.argmax(ops.cast(mask, "int32"), axis=1), "int32")
        first = ops.expand_dims(first, -1)
        continues = None if start is None else ops.expand_dims(start > 0, -1)
    else:
        row = ops.expand_dims(ops.arange(batch, dtype="int32"), -1)
        most = length if start is None else length + 1  # the state's run, and one for each token
        run = ops.reshape(runs + row * most, (-1,))
        candidates = ops.reshape(ops.where(mask, index, length), (-1,))
        first = ops.segment_min(candidates, run, num_segments=batch * most)
        first = ops.reshape(ops.take(first, run, axis=0), (batch, length))
        continues = None
        if start is not None:
            continues = ops.logical_and(ops.equal(runs, 0), ops.expand_dims(start > 0, -1))
    if continues is not None:
        first = ops.where(continues, -ops.expand_dims(start, -1), first)
    return index - first


def _ending(near: NearField, key_mask: Any, runs: Any) -> tuple[Any, Any, Any]:
    """Of the last sequence of each row: its unmasked slots (B, S), the last one, what follows."""
    belongs = ops.any(key_mask, axis=1)
    if runs is not None:
        belongs = ops.logical_and(belongs, ops.equal(runs, runs[:, -1:]))
    behind = ops.argmax(ops.cast(ops.flip(belongs, axis=1), "int32"), axis=1)
    last = ops.cast(ops.shape(belongs)[1] - 1 - behind, "int32")
    position = ops.take_along_axis(near.positions, ops.expand_dims(last, -1), axis=1)
    following = ops.where(ops.any(belongs, axis=1), ops.squeeze(position, -1) + 1, 0)
    return belongs, last, ops.cast(following, "int32")


def _mask_of_heads(mask: Any, key: Any) -> Any:
    """Give each key head its own mask: (B, K or 1, L) -> (B, K, L)."""
    batch, num_heads = ops.shape(key)[:2]
    return ops.broadcast_to(mask, (batch, num_heads, ops.shape(mask)[2]))
