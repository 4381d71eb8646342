"""A look inside attention: the queries and keys of every layer that runs within a context."""

import contextlib
import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class AttentionRecord(NamedTuple):
    """What one call of a `PerformerAttention` compares."""

    layer: Any
    """The layer."""
    query: Any
    """(B, T, N, H), after normalisation and rotation, as it goes into `favor_attention`."""
    key: Any
    """(B, S, K, H), likewise."""
    key_mask: Any
    """None, or boolean (B, S) or (B, K, S)."""
    causal: bool
    """Whether query t sees only keys 0 to t."""
    segment_ids: Any
    """None, or integers (B, T)."""


_RECORDS: contextvars.ContextVar[list[AttentionRecord] | None] = contextvars.ContextVar(
    "records", default=None
)


@contextlib.contextmanager
def _collect(variable: contextvars.ContextVar[Any]) -> Iterator[Any]:
    """Let a variable hold a new list inside this context, and what it held afterwards."""
    found: list[Any] = []
    token = variable.set(found)
    try:
        yield found
    finally:
        variable.reset(token)


def record_attention() -> contextlib.AbstractContextManager[list[AttentionRecord]]:
    """Collect an `AttentionRecord` of every call of a `PerformerAttention` inside this context.

    Run the model eagerly: within a compiled function there are no values to look at.

    **Returns** The list that calls are added to, in their order.

    **Example**

    >>> layer = keras_performer.layers.PerformerAttention(num_heads=2, key_dim=8)
    >>> x = np.ones((1, 5, 12), "float32")
    >>> with record_attention() as records:
    ...     _ = layer(x, x)
    >>> records[0].layer is layer, tuple(records[0].query.shape)
    (True, (1, 5, 2, 8))
    """
    return _collect(_RECORDS)


def record(layer: Any, query: Any, key: Any, key_mask: Any, causal: bool, segment_ids: Any) -> None:
    """Add a call to the list of the innermost `record_attention`; without one do nothing."""
    records = _RECORDS.get()
    if records is not None:
        records.append(AttentionRecord(layer, query, key, key_mask, causal, segment_ids))


class AttentionCall(NamedTuple):
    """What one call of a `PerformerAttention` was given and returned."""

    layer: Any
    """The layer."""
    arguments: dict[str, Any]
    """The arguments of `call`, by name."""
    output: Any
    """What it returned."""


_CALLS: contextvars.ContextVar[list[AttentionCall] | None] = contextvars.ContextVar(
    "calls", default=None
)


def record_calls() -> contextlib.AbstractContextManager[list[AttentionCall]]:
    """Collect an `AttentionCall` of every call of a `PerformerAttention` inside this context.

    Within a compiled function its tensors are those of that function, to compute on.

    **Returns** The list that calls are added to, in their order.

    **Example**

    >>> layer = keras_performer.layers.PerformerAttention(num_heads=2, key_dim=8)
    >>> x = np.ones((1, 5, 12), "float32")
    >>> with record_calls() as calls:
    ...     _ = layer(x, x, use_causal_mask=True)
    >>> calls[0].arguments["use_causal_mask"], tuple(calls[0].output.shape)
    (True, (1, 5, 12))
    """
    return _collect(_CALLS)


def recorded(call: Callable[..., Any]) -> Callable[..., Any]:
    """Let `record_calls` see the calls of a layer's `call`."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def recorded_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(layer, *args, **kwargs)
        calls = _CALLS.get()
        if calls is not None:
            arguments = signature.bind(layer, *args, **kwargs).arguments
            arguments.pop("self")
            calls.append(AttentionCall(layer, arguments, output))
        return output

    return recorded_call
