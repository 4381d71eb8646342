"""What every walk over chunks shares: cutting sequences, masks of chunks, the final quotient."""

import math
from typing import Any

from keras import backend, ops

LOG_ZERO = -(2.0**100)
"""Stands for the logarithm of zero: finite, so that differences of two stay numbers, and a power of
two, so that every float type holds the same."""


LOG2_E = math.log2(math.e)


def exp(x: Any) -> Any:
    """The exponential.

    PyTorch's is MKL's on x86, which takes ten times as long where the result underflows, as it does
    for every masked pair. Its power of two is vectorised by another library and does not.
    """
    return ops.exp2(x * LOG2_E) if backend.backend() == "torch" else ops.exp(x)


def by_hand(*tensors: Any) -> Any:
    """The module with gradients written out, where it applies to `tensors`, or None."""
    if backend.backend() != "torch":
        return None
    from keras_performer.ops import _torch

    return _torch if _torch.applies(*tensors) else None


def hide(scores: Any, visible: Any) -> Any:
    """Log scores, and the log of zero where they are not `visible`; the two are broadcast.

    A sum takes a fraction of the time of a selection, forwards and backwards. It is the log of zero
    exactly, for scores below 2^75.
    """
    return scores + ops.where(visible, ops.zeros((), dtype_of(scores)), LOG_ZERO)


def dtype_of(x: Any) -> str:
    """The name of a tensor's type, on every backend."""
    return backend.standardize_dtype(x.dtype)


def plan(length: Any, largest: int) -> tuple[int, Any]:
    """Chunk length and number of chunks for `length` tokens, static or not.

    Chunks of a static length are even, and multiples of eight where there are several.
    """
    if not isinstance(length, int):
        return largest, (length + largest - 1) // largest
    num_chunks = max(1, math.ceil(length / largest))
    size = math.ceil(length / num_chunks)
    if num_chunks > 1:
        size = math.ceil(size / 8) * 8
    return size, max(1, math.ceil(length / size))


def is_one(count: Any) -> bool:
    """Whether a count, static or a tensor, is known to be one."""
    return isinstance(count, int) and count == 1


def pad(x: Any, axis: int, length: Any, before: int = 0) -> Any:
    """Pad `axis` with zeros to `length`, static or not, `before` of them at its start."""
    current = ops.shape(x)[axis]
    shape, parts = [*ops.shape(x)], [x]
    if before:
        shape[axis] = before
        parts.insert(0, ops.zeros(shape, dtype_of(x)))
    missing = length - current - before
    if not (isinstance(missing, int) and missing == 0):
        shape[axis] = missing
        parts.append(ops.zeros(shape, dtype_of(x)))
    return ops.concatenate(parts, axis=axis) if len(parts) > 1 else x


def part(x: Any, axis: int, start: int, length: Any) -> Any:
    """Slots `start` to `start + length` of `axis` (positive).

    What `x[start:stop]` is, but its gradient is a padding on TensorFlow, which takes a fraction of
    the time of that of an index.
    """
    if x.shape[axis] == length and isinstance(length, int):
        return x
    starts, shape = [0] * len(x.shape), [*ops.shape(x)]
    starts[axis], shape[axis] = start, length
    return ops.slice(x, starts, shape)


def split(x: Any, axis: int, size: int) -> Any:
    """Split `axis` (positive), a multiple of `size`, into (num_chunks, ..., size, ...)."""
    shape = [*ops.shape(x)]
    x = ops.reshape(x, (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :]))
    return ops.transpose(x, (axis, *(i for i in range(len(shape) + 1) if i != axis)))


def overlapping(
    x: Any, axis: int, size: int, num_chunks: Any, *, lead: int, before: int, after: int
) -> Any:
    """Cut `axis` into chunks of `size`, each with the slots beside it, and zeros at the end.

    Args:
        x: A tensor.
        axis: Positive.
        size: At least `after` if there are several chunks.
        num_chunks: Number of chunks.
        lead: Zeros to put before x. The first chunk begins at slot `before` of the two.
        before: Slots to the left that a chunk has besides its own.
        after: Slots to the right.

    Returns:
        (num_chunks, ..., before + size + after, ...).
    """
    if is_one(num_chunks):  # which may be shorter than what lies beside it
        return ops.expand_dims(pad(x, axis, before + size + after, lead), 0)
    x = pad(x, axis, before + num_chunks * size + (size if after else 0), lead)

    def chunks(start: int, length: int) -> Any:
        found = split(part(x, axis, start, num_chunks * size), axis, size)
        return found if length == size else part(found, axis + 1, 0, length)

    parts = [chunks(start, min(size, before - start)) for start in range(0, before, size)]
    parts.append(chunks(before, size))
    if after:
        parts.append(chunks(before + size, after))
    return ops.concatenate(parts, axis=axis + 1) if len(parts) > 1 else parts[0]


def with_ones(value: Any, mask: Any) -> Any:
    """Append to (B, K, S, V) a column of ones, zero where masked: its sum is the denominator."""
    ones = ops.cast(ops.expand_dims(mask, -1), dtype_of(value))
    ones = ops.broadcast_to(ones, (*ops.shape(value)[:-1], 1))
    return ops.concatenate([value, ones], axis=-1)


def split_rows(query: Any, size: int, num_chunks: Any) -> Any:
    """The rows of all query groups by chunks: (B, K, G, T, H) -> (num_chunks, B, K, G*size, H)."""
    return ops.squeeze(rows_by_steps(query, size, 1, num_chunks), 3)


def join_rows(rows: Any, query: Any, size: int) -> Any:
    """The reverse for an output: (num_chunks, B, K, G*size, V) -> (B, K, G, T, V)."""
    return rows_of_steps(ops.expand_dims(rows, 3), query, size)


def rows_by_steps(query: Any, size: int, count: int, num_steps: Any) -> Any:
    """The rows of all query groups by steps of E = `count` chunks each.

    (B, K, G, T, H) -> (num_steps, B, K, E, G*size, H).
    """
    query = pad(query, 3, num_steps * count * size)
    batch, num_heads, num_groups, _, head_dim = ops.shape(query)
    shape = (batch, num_heads, num_groups, num_steps, count, size, head_dim)
    query = ops.transpose(ops.reshape(query, shape), (3, 0, 1, 4, 2, 5, 6))
    return ops.reshape(query, (num_steps, batch, num_heads, count, num_groups * size, head_dim))


def rows_of_steps(rows: Any, query: Any, size: int) -> Any:
    """The reverse for an output: (num_steps, B, K, E, G*size, V) -> (B, K, G, T, V)."""
    num_steps, batch, num_heads, count, _, value_dim = ops.shape(rows)
    num_groups, length = ops.shape(query)[2:4]
    rows = ops.reshape(rows, (num_steps, batch, num_heads, count, num_groups, size, value_dim))
    rows = ops.transpose(rows, (1, 2, 4, 0, 3, 5, 6))
    shape = (batch, num_heads, num_groups, num_steps * count * size, value_dim)
    return part(ops.reshape(rows, shape), 3, 0, length)


def by_chunks(x: Any, size: int) -> Any:
    """The tokens of a step by chunks: (B, K, E*size, ...) -> (B, K, E, size, ...)."""
    shape = [*ops.shape(x)]
    return ops.reshape(x, (*shape[:2], shape[2] // size, size, *shape[3:]))


def same_run(run_a: Any, run_b: Any) -> Any:
    """Whether two tokens are of one segment: (B, ..., L), (B, ..., L') -> (B, 1, ..., L, L')."""
    return ops.expand_dims(
        ops.equal(ops.expand_dims(run_a, -1), ops.expand_dims(run_b, -2)), axis=1
    )


def run_before(run: Any, last: int = -1) -> Any:
    """The run (n, B) at slot `last` of the chunk before each of (n, B, L); 0 before the first."""
    return ops.concatenate([ops.zeros_like(run[:1, :, 0]), run[:-1, :, last]], axis=0)


def reads_run(run: Any, carried_run: Any, num_groups: int) -> Any:
    """Which rows (B, 1, ..., G*C, 1) of runs (B, ..., C) read a state of `carried_run` (B, ...)."""
    return tile_rows(same_run(run, ops.expand_dims(carried_run, -1)), num_groups)


def tile_rows(mask: Any, num_groups: int) -> Any:
    """Repeat a mask over tokens (..., C, X) for the rows of all query groups (..., G*C, X)."""
    return mask if num_groups == 1 else ops.concatenate([mask] * num_groups, axis=-2)


def normalize(weighted: Any) -> Any:
    """Divide (..., V) by a last column, the denominator; a row that saw no key gives zeros.

    The row is first scaled by a constant that brings its denominator to one: the gradient of a
    quotient may be formed from the square of the denominator, which can leave the float32 range.
    Where there is none the row is multiplied by zero: to select rows would take another pass.
    """
    axis, value_dim = len(weighted.shape) - 1, weighted.shape[-1] - 1
    denominator = part(weighted, axis, value_dim, 1)
    seen = denominator > 0
    scale = ops.stop_gradient(ops.where(seen, denominator, 1.0))
    inverse = ops.where(seen, 1.0 / ops.where(seen, denominator / scale, 1.0), 0.0)
    return part(weighted, axis, 0, value_dim) / scale * inverse


def run_indices(segment_ids: Any, first: Any = None) -> Any:
    """Number the runs of equal ids (B, T) from zero; `first` (B, 1) is the id before the first."""
    segment_ids = ops.cast(segment_ids, "int32")
    first = segment_ids[:, :1] if first is None else ops.cast(first, "int32")
    previous = ops.concatenate([first, segment_ids[:, :-1]], axis=1)
    return ops.cumsum(ops.cast(ops.not_equal(segment_ids, previous), "int32"), axis=1)
