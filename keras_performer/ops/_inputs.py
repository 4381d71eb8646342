"""What the attention ops ask of their inputs, and how they lay them out: by key heads."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from keras import backend, ops

from keras_performer.ops._chunks import dtype_of

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """Let a function of queries compute in the types it asks for within `torch.autocast`."""
    if backend.backend() != "torch":
        return function
    import torch

    @functools.wraps(function)
    def exact(query: Any, *args: Any, **kwargs: Any) -> Any:
        device = query.device.type if isinstance(query, torch.Tensor) else "cpu"
        if not torch.is_autocast_enabled(device):
            return function(query, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(query, *args, **kwargs)

    return exact  # pyright: ignore[reportReturnType]


def _outside_of_traces() -> contextlib.AbstractContextManager[None]:
    """Where weights are made: on JAX they outlive the trace in which that may happen."""
    if backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.ensure_compile_time_eval()


def build_map(feature_map: Any, key: Any) -> None:
    """Build a feature map that is not built, and raise ValueError if it is for other keys."""
    if not feature_map.built:
        with _outside_of_traces():
            feature_map.build(tuple(key.shape))
    if feature_map.head_dim != key.shape[-1]:
        raise ValueError(
            f"The feature map was built for head size {feature_map.head_dim}: make a new one for "
            f"another. Received: key of shape {tuple(key.shape)}"
        )


def wide_dtype(x: Any) -> str:
    """The name of the type to sum in: float32, and float64 for float64."""
    return "float64" if dtype_of(x) == "float64" else "float32"


def group_queries(query: Any, num_key_heads: int) -> Any:
    """The queries of each key head: (B, T, N, H) -> (B, K, G, T, H) with N = K G."""
    batch, length, num_heads, head_dim = ops.shape(query)
    shape = (batch, length, num_key_heads, num_heads // num_key_heads, head_dim)
    return ops.transpose(ops.reshape(query, shape), (0, 2, 3, 1, 4))


def ungroup(output: Any) -> Any:
    """The reverse: (B, K, G, T, V) -> (B, T, N, V)."""
    batch, num_key_heads, num_groups, length, value_dim = ops.shape(output)
    output = ops.transpose(output, (0, 3, 1, 2, 4))
    return ops.reshape(output, (batch, length, num_key_heads * num_groups, value_dim))


def by_key_heads(x: Any, key_mask: Any) -> Any:
    """Keys or values by their heads: (B, S, K, H) -> (B, K, S, H).

    Those that a mask (B, 1 or K, S) hides are zero: what they hold, NaN included, does not matter.
    """
    x = ops.transpose(x, (0, 2, 1, 3))
    return x if key_mask is None else ops.where(ops.expand_dims(key_mask, -1), x, 0.0)


def differ(a: Any, b: Any) -> bool:
    """Whether two sizes are known and not the same."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def fits(shape: Any, expected: Any) -> bool:
    """Whether a shape has as many axes as expected, and none of a size that differs."""
    return len(shape) == len(expected) and not any(map(differ, shape, expected))


def check_shapes(query: Any, key: Any, value: Any, causal: bool, segmented: bool) -> None:
    """Raise unless queries (B, T, N, H), keys (B, S, K, H) and values (B, S, K, V) go together."""
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    received = "Received: " + ", ".join(f"{n}.shape={tuple(s)}" for n, s in shapes.items())
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if len(tensor.shape) != 4:
            raise ValueError(
                f"{name} must have four axes (batch, length, heads, head size). {received}"
            )
        if any(d == 0 for d in tensor.shape):
            raise ValueError(f"{name} must not have an empty axis. {received}")
        if not backend.is_float_dtype(dtype_of(tensor)):
            raise TypeError(
                f"{name} must be floating point; cast it first. Received: "
                f"{name}.dtype={dtype_of(tensor)}"
            )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head size (axis 3). {received}")
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"key and value must have the same number of heads (axis 2). {received}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"The number of query heads must be a multiple of the key heads' (axis 2). {received}"
        )
    if differ(key.shape[1], value.shape[1]):
        raise ValueError(f"key and value must have the same length (axis 1). {received}")
    for tensor in (key, value):
        if differ(query.shape[0], tensor.shape[0]):
            raise ValueError(f"query, key and value must have one batch size (axis 0). {received}")
    if (causal or segmented) and differ(query.shape[1], key.shape[1]):
        what = "causal=True" if causal else "segment_ids"
        raise ValueError(
            f"{what} needs queries and keys of the same positions, of one length (axis 1). "
            f"{received}"
        )


def check_key_mask(key_mask: Any, key: Any) -> Any:
    """Return a mask of keys (B, S, K, H) as boolean (B, 1 or K, S), and None for None.

    Raise ValueError for other shapes.
    """
    if key_mask is None:
        return None
    key_mask = ops.cast(ops.convert_to_tensor(key_mask), "bool")
    shape = tuple(key_mask.shape)
    batch, length, num_heads, _ = key.shape
    accepted = (batch, length), (batch, 1, length), (batch, num_heads, length)
    if not any(fits(shape, each) for each in accepted):
        raise ValueError(
            "key_mask must have the shape (batch, key length) or (batch, key heads, key length), "
            f"here ({batch}, {length}) or ({batch}, {num_heads}, {length}). Masks that differ "
            "between queries cannot be honoured in linear time: use causal=True or segment_ids. "
            f"Received: key_mask.shape={shape}"
        )
    return key_mask if len(shape) == 3 else ops.expand_dims(key_mask, 1)


def check_segment_ids(segment_ids: Any, query: Any) -> Any:
    """Return ids as a tensor, and None for None.

    Raise unless there is an integer for each of (B, T, ...).
    """
    if segment_ids is None:
        return None
    segment_ids = ops.convert_to_tensor(segment_ids)
    if backend.is_float_dtype(dtype_of(segment_ids)):
        raise TypeError(
            "segment_ids must be integers; cast them first. Received: segment_ids of type "
            f"{dtype_of(segment_ids)}"
        )
    shape, expected = tuple(segment_ids.shape), tuple(query.shape[:2])
    if not fits(shape, expected):
        raise ValueError(
            "segment_ids must be integers of shape (batch, length), one for each query, here "
            f"{expected}. Received: segment_ids of shape {shape}"
        )
    return segment_ids
