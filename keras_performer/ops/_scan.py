"""A scan whose backward pass recomputes each step, on each backend by its own means.

`scan(body, carry, xs, weights)` walks over the leading axis of `xs`. Its gradient keeps the
carries at the step boundaries and nothing else: each step is run again, and differentiated by the
backend itself, when the backward pass reaches it. On PyTorch, which compiles nothing, a few steps
are kept as they are: that takes three quarters of the time, and memory that has a bound. Every
tensor that `body` needs is an argument, because a tensor closed over by `body` gets no gradient
under the TensorFlow and PyTorch backends.

Written here because `keras.ops.scan` keeps every intermediate result, unrolls on PyTorch without
freeing anything, and on TensorFlow asks for outputs shaped like the carry.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

Tensors = tuple[Any, ...]
Body = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]

_KEPT_STEPS = 4
"""The most steps that PyTorch keeps: 20 to 50 MiB each, with the sizes of `_sums`."""

_EXPORTING: contextvars.ContextVar[bool] = contextvars.ContextVar("exporting", default=False)


@contextlib.contextmanager
def export_loops() -> Iterator[None]:
    """Trace TensorFlow loops in the form that LiteRT can lower with a dynamic batch and length.

    Inside this context a loop collects its outputs by slice updates, which LiteRT has builtin
    operators for, and keeps nothing for a backward pass. Outside it a loop collects them in
    tensor arrays, which run 40 times as fast in a TensorFlow graph but lower only with static
    shapes. Changes nothing under the JAX and PyTorch backends.

    **Example**

    >>> with keras_performer.ops.export_loops():  # doctest: +SKIP
    ...     concrete = tf.function(model).get_concrete_function(spec)
    """
    token = _EXPORTING.set(True)
    try:
        yield
    finally:
        _EXPORTING.reset(token)


def scan(
    body: Body,
    carry: Tensors,
    xs: Tensors,
    weights: Tensors = (),
    *,
    output_shapes: Sequence[Sequence[Any]] = (),
    reverse: bool = False,
) -> tuple[Tensors, Tensors]:
    """Run `carry, ys[i] = body(carry, xs[i], weights)` over i, recomputing in the backward pass.

    Args:
        body: A pure function of three tuples of tensors. It returns the next carry, of the
            shapes and types of the carry, and a tuple of outputs of the type of `carry[0]`.
        carry: Floating-point tensors; `carry[0]` sets the type of the outputs.
        xs: Tensors with a common leading axis of at least one step. Integers and booleans get
            no gradient.
        weights: Floating-point tensors that every step reads; their gradients are summed.
        output_shapes: The shape of each output of one step, integers or scalar tensors.
        reverse: Whether to walk from the last step to the first. `ys` keeps the order of `xs`.

    Returns:
        The last carry and the tuple of outputs, stacked along a new leading axis.
    """
    if xs[0].shape[0] == 1:
        # Nothing to save: a single step keeps no more than its own recomputation would.
        carry, ys = body(carry, tuple(x[0] for x in xs), weights)
        return tuple(carry), tuple(keras.ops.expand_dims(y, 0) for y in ys)
    backend = keras.backend.backend()
    if backend == "jax":
        return _jax_scan(body, carry, xs, weights, reverse)
    if backend == "torch":
        return _torch_scan(body, carry, xs, weights, reverse)
    if backend == "tensorflow":
        return _tensorflow_scan(body, carry, xs, weights, output_shapes, reverse)
    raise ValueError(
        "keras_performer runs on the TensorFlow, JAX and PyTorch backends. "
        f"Received: keras.backend.backend()={backend!r}. Set KERAS_BACKEND before importing keras."
    )


def carries_of(
    step: Callable[[Tensors, Tensors, Tensors], Tensors],
    carry: Tensors,
    xs: Tensors,
    weights: Tensors,
    *,
    reverse: bool = False,
) -> Tensors:
    """The carry that each step of `carry = step(carry, xs[i], weights)` begins with, stacked."""

    def body(carry: Tensors, x: Tensors, weights: Tensors) -> tuple[Tensors, Tensors]:
        return step(carry, x, weights), carry

    shapes = [keras.ops.shape(tensor) for tensor in carry]
    return scan(body, carry, xs, weights, output_shapes=shapes, reverse=reverse)[1]


def _loop(
    body: Body, carry: Tensors, xs: Tensors, weights: Tensors, reverse: bool
) -> tuple[Tensors, Tensors, list[Tensors]]:
    """The scan in Python: the last carry, the outputs, and the carry that each step begins with."""
    steps = list(zip(*(keras.ops.unstack(x) for x in xs), strict=True))
    outputs, boundaries = [], []
    for x in reversed(steps) if reverse else steps:
        boundaries.append(carry)
        carry, y = body(carry, x, weights)
        outputs.append(y)
    if reverse:
        outputs.reverse()
        boundaries.reverse()
    return tuple(carry), tuple(keras.ops.stack(y) for y in zip(*outputs, strict=True)), boundaries


# JAX: rematerialisation of the scan body is all there is to it.


def _jax_scan(
    body: Body, carry: Tensors, xs: Tensors, weights: Tensors, reverse: bool
) -> tuple[Tensors, Tensors]:
    import jax
    import jax.core

    if not any(isinstance(tensor, jax.core.Tracer) for tensor in (*carry, *xs, *weights)):
        # Nothing to differentiate or compile, and a scan would compile anew at each call.
        return _loop(body, carry, xs, weights, reverse)[:2]
    # A scan cannot merge the recomputation with the forward pass, so nothing need prevent it.
    step = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(lambda c, x: step(c, x, weights), carry, xs, reverse=reverse)


# PyTorch: a Python loop inside one autograd function.


def _torch_scan(
    body: Body, carry: Tensors, xs: Tensors, weights: Tensors, reverse: bool
) -> tuple[Tensors, Tensors]:
    import torch

    tensors = (*carry, *xs, *weights)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not recorded or xs[0].shape[0] <= _KEPT_STEPS:
        return _loop(body, carry, xs, weights, reverse)[:2]
    results = _torch_function().apply(body, (len(carry), len(xs)), reverse, *tensors)
    return results[: len(carry)], results[len(carry) :]


def torch_gradients_again(function: Callable[..., Any], cotangents: Any, inputs: Any) -> list[Any]:
    """The gradient of each input of a function, to be differentiated: it keeps everything.

    The function returns a tensor or a tuple of them.
    """
    # Of views: where one input was computed from another, the other's has no path through it.
    views = [tensor.view_as(tensor) for tensor in inputs]
    outputs = function(*views)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return _torch_gradients(outputs, cotangents, views, create_graph=True)


def _torch_gradients(
    outputs: Any, cotangents: Any, inputs: Any, create_graph: bool = False
) -> list[Any]:
    """The gradient of each input, None where it has none."""
    import torch

    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and output.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [tensor for tensor in inputs if tensor.requires_grad],
            [cotangent for _, cotangent in pairs],
            allow_unused=True,
            create_graph=create_graph,
        )
    )
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


@functools.cache
def _torch_function() -> Any:
    import torch

    class RecomputedScan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, body: Body, sizes: tuple[int, int], reverse: bool, *tensors: Any):
            carry, xs, weights = _split(tensors, sizes)
            last, ys, boundaries = _loop(body, carry, xs, weights, reverse)
            ctx.body, ctx.sizes, ctx.reverse = body, sizes, reverse
            ctx.save_for_backward(*xs, *weights, *(t for step in boundaries for t in step))
            ctx.set_materialize_grads(False)
            # A carry that no step changed must not be returned as the input itself.
            return (*(t.view_as(t) for t in last), *ys)

        @staticmethod
        def backward(ctx: Any, *grads: Any):
            num_carry, num_xs = ctx.sizes
            saved = ctx.saved_tensors  # which checkpointing lets a backward pass read once
            steps = saved[0].shape[0]
            split = len(saved) - steps * num_carry
            if torch.is_grad_enabled():  # for a derivative of the gradient
                first = len(saved) - num_carry if ctx.reverse else split
                tensors = (*saved[first : first + num_carry], *saved[:split])

                def results(*tensors: Any) -> Tensors:
                    last, ys, _ = _loop(ctx.body, *_split(tensors, ctx.sizes), ctx.reverse)
                    return (*last, *ys)

                return (None, None, None, *torch_gradients_again(results, grads, tensors))
            xs, weights, boundaries = saved[:num_xs], saved[num_xs:split], saved[split:]
            d_carry, d_ys = list(grads[:num_carry]), grads[num_carry:]
            d_weights: list[Any] = [None] * len(weights)
            d_xs: list[list[Any]] = [[None] * steps for _ in xs]
            # A carry passes gradients on, whoever asks for them.
            wanted = (*(True,) * num_carry, *ctx.needs_input_grad[3 + num_carry :])
            for i in range(steps) if ctx.reverse else reversed(range(steps)):
                tensors = (
                    *boundaries[i * num_carry : (i + 1) * num_carry],
                    *(x[i] for x in xs),
                    *weights,
                )
                inputs = [
                    t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)
                ]
                with torch.enable_grad():
                    carry, ys = ctx.body(*_split(inputs, ctx.sizes))
                d_outputs = (*d_carry, *(None if g is None else g[i] for g in d_ys))
                step = _torch_gradients((*carry, *ys), d_outputs, inputs)
                d_carry = step[:num_carry]
                for j in range(num_xs):
                    d_xs[j][i] = step[num_carry + j]
                for j in range(len(weights)):
                    grad = step[num_carry + num_xs + j]
                    if grad is not None:
                        d_weights[j] = grad if d_weights[j] is None else d_weights[j] + grad
            stacked = [
                None
                if all(g is None for g in column)
                else torch.stack(
                    [torch.zeros_like(x[i]) if g is None else g for i, g in enumerate(column)]
                )
                for x, column in zip(xs, d_xs, strict=True)
            ]
            return (None, None, None, *d_carry, *stacked, *d_weights)

    return RecomputedScan


def _split(tensors: Sequence[Any], sizes: tuple[int, int]) -> tuple[Tensors, Tensors, Tensors]:
    first, second = sizes[0], sizes[0] + sizes[1]
    return tuple(tensors[:first]), tuple(tensors[first:second]), tuple(tensors[second:])


# TensorFlow: two while loops joined by a custom gradient.


def _tensorflow_scan(
    body: Body,
    carry: Tensors,
    xs: Tensors,
    weights: Tensors,
    output_shapes: Sequence[Sequence[Any]],
    reverse: bool,
) -> tuple[Tensors, Tensors]:
    import tensorflow as tf

    sizes = (len(carry), len(xs))
    dtype = carry[0].dtype
    outputs_like = [(dtype, shape) for shape in output_shapes]

    if _EXPORTING.get():
        return _tensorflow_loop(
            lambda c, x: body(c, x, weights), carry, xs, outputs_like, reverse, slice_updates=True
        )

    @tf.custom_gradient
    def run(*tensors: Any):
        carry, xs, weights = _split(tensors, sizes)
        carries_like = [(t.dtype, _shape(t)) for t in carry]

        def forward_step(c: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
            following, ys = body(c, x, weights)
            return following, (*ys, *c)

        last, collected = _tensorflow_loop(
            forward_step, carry, xs, [*outputs_like, *carries_like], reverse
        )
        ys, boundaries = collected[: len(output_shapes)], collected[len(output_shapes) :]

        def gradient(*upstream: Any):
            d_carry, d_ys = upstream[: sizes[0]], upstream[sizes[0] :]
            floating = [t.dtype.is_floating for t in xs]

            def backward_step(c: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
                d_carry, d_weights = c[: sizes[0]], c[sizes[0] :]
                start, x_i, d_y = _split(x, sizes)
                watched = (
                    *start,
                    *(t for t, f in zip(x_i, floating, strict=True) if f),
                    *weights,
                )
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(watched)
                    following, ys = body(start, x_i, weights)
                grads = tape.gradient(
                    [*following, *ys],
                    watched,
                    output_gradients=[*d_carry, *d_y],
                    unconnected_gradients=tf.UnconnectedGradients.ZERO,
                )
                d_start, d_x, d_w = _split(grads, (sizes[0], sum(floating)))
                return (*d_start, *(a + b for a, b in zip(d_weights, d_w, strict=True))), d_x

            like = [(t.dtype, _shape(t)[1:]) for t, f in zip(xs, floating, strict=True) if f]
            last, d_floating = _tensorflow_loop(
                backward_step,
                (*d_carry, *(tf.zeros_like(w) for w in weights)),
                (*boundaries, *xs, *d_ys),
                like,
                not reverse,
            )
            remaining = iter(d_floating)
            d_xs = [next(remaining) if f else None for f in floating]
            return (*last[: sizes[0]], *d_xs, *last[sizes[0] :])

        return (*last, *ys), gradient

    # A custom gradient takes tensors, not variables.
    results = run(*(tf.convert_to_tensor(t) for t in (*carry, *xs, *weights)))
    return tuple(results[: sizes[0]]), tuple(results[sizes[0] :])


def _tensorflow_loop(
    step: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]],
    carry: Tensors,
    xs: Tensors,
    outputs_like: Sequence[tuple[Any, Sequence[Any]]],
    reverse: bool,
    slice_updates: bool = False,
) -> tuple[Tensors, Tensors]:
    import tensorflow as tf

    num_steps = _shape(xs[0])[0]

    def static(shape: Sequence[Any]) -> list[int | None]:
        return [d if isinstance(d, int) else None for d in shape]

    if slice_updates:
        outputs = tuple(tf.zeros((num_steps, *shape), dtype) for dtype, shape in outputs_like)
    else:
        outputs = tuple(
            tf.TensorArray(dtype, size=num_steps, element_shape=static(shape))
            for dtype, shape in outputs_like
        )

    def write(output: Any, index: Any, value: Any) -> Any:
        if slice_updates:
            start = (index, *(0 for _ in value.shape))
            return keras.ops.slice_update(output, start, tf.expand_dims(value, 0))
        return output.write(index, value)

    def loop_body(i: Any, carry: Tensors, outputs: Tensors):
        index = num_steps - 1 - i if reverse else i
        carry, ys = step(carry, tuple(x[index] for x in xs))
        return i + 1, carry, tuple(write(o, index, y) for o, y in zip(outputs, ys, strict=True))

    _, carry, outputs = tf.while_loop(
        lambda i, carry, outputs: i < num_steps,
        loop_body,
        (tf.constant(0), carry, outputs),
        parallel_iterations=1,
    )
    return carry, outputs if slice_updates else tuple(o.stack() for o in outputs)


def _shape(tensor: Any) -> list[Any]:
    import tensorflow as tf

    dynamic = tf.shape(tensor)
    return [dynamic[i] if d is None else d for i, d in enumerate(tensor.shape)]
