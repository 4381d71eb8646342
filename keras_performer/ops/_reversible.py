"""Two residual streams whose backward pass computes the activations again from the last ones.

`branches[i]` reads one stream and adds to the other, in turns: the sum can be undone by computing
the branch again. So a stack of any depth keeps two tensors, and not two a layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

Tensors = tuple[Any, ...]
Branch = Callable[[Any, Tensors, Tensors, Tensors, Tensors], tuple[Any, Tensors]]


def compiles() -> bool:
    """Whether XLA should compile what calls `reversible`.

    Under TensorFlow it takes minutes and gigabytes for two dozen layers, and then keeps what the
    order of a graph frees; see `_after`.
    """
    return keras.backend.backend() != "tensorflow"


def reversible(
    branches: Sequence[Branch],
    streams: tuple[Any, Any],
    weights: Sequence[Tensors],
    states: Sequence[Tensors],
    extras: Tensors = (),
    constants: Tensors = (),
) -> tuple[tuple[Any, Any], list[Tensors]]:
    """Run two streams through branches: stream i % 2 += branch_i(the other stream).

    Args:
        branches: Pure functions `branch(x, weights, states, extras, constants)`; each returns what
            to add, of the shape and type of x, and its new states.
        streams: Two tensors of one shape, float32 or wider: rounding is not undone exactly.
        weights: The floating-point tensors of each branch. They get gradients.
        states: Tensors of each branch that get none, such as the states of seed generators.
        extras: Floating-point tensors that all branches read. They get gradients.
        constants: Further tensors that all branches read; they get none.

    Returns:
        The last two streams, and the new states of each branch.
    """
    groups = (streams, *weights, extras, *states, constants)
    sizes = [len(group) for group in groups]
    tensors = [tensor for group in groups for tensor in group]
    count = len(branches)
    in_same_types = _within_autocast(streams[0])

    def split(tensors: Sequence[Any]) -> tuple[Any, list[Any], Any, list[Any], Any]:
        parts, start = [], 0
        for size in sizes:
            parts.append(tuple(tensors[start : start + size]))
            start += size
        return (
            parts[0], parts[1 : count + 1], parts[count + 1], parts[count + 2 : -1], parts[-1]
        )  # fmt: skip

    def forward(*tensors: Any, alone: bool = False) -> list[Any]:
        streams, weights, extras, states, constants = split(tensors)
        both, after = list(streams), []
        for i, branch in enumerate(branches):
            arguments = (both[(i + 1) % 2], weights[i], states[i], extras, constants)
            if alone:
                delta, new = _alone(branch, arguments, (arguments[0], states[i]))
            else:
                delta, new = branch(*arguments)
            both[i % 2] = both[i % 2] + delta
            after.append(new)
        return [*both, *(tensor for new in after for tensor in new)]

    def backward(tensors: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
        """Gradients of the streams, weights and extras; `tensors` begin with the last streams."""
        last, weights, extras, states, constants = split(tensors)
        both, d_both = list(last), list(grads)
        d_weights: list[Any] = [None] * count
        d_extras: list[Any] = [None] * len(extras)
        for i in reversed(range(count)):

            def delta_of(
                x: Any, *rest: Any, i: int = i, size: int = len(weights[i])
            ) -> tuple[Any, Any]:
                return branches[i](x, rest[:size], states[i], rest[size:], constants)

            source = both[(i + 1) % 2]
            delta, found = _pull_back(
                in_same_types(delta_of), (source, *weights[i], *extras), d_both[i % 2]
            )
            both[i % 2] = both[i % 2] - delta
            d_both[(i + 1) % 2] = d_both[(i + 1) % 2] + found[0]
            d_weights[i] = found[1 : 1 + len(weights[i])]
            for j, d_extra in enumerate(found[1 + len(weights[i]) :]):
                d_extras[j] = d_extra if d_extras[j] is None else d_extras[j] + d_extra
            both = _after(both, [*d_both, *d_weights[i]])
        return [*d_both, *(g for group in d_weights for g in group), *d_extras]

    num_differentiable = sum(sizes[: count + 2])
    results = _with_gradient(forward, backward, num_differentiable, tensors)
    after, start = [], 2
    for group in states:
        after.append(tuple(results[start : start + len(group)]))
        start += len(group)
    return (results[0], results[1]), after


def _after(streams: list[Any], grads: list[Any]) -> list[Any]:
    """The streams, which a compiler may not use before the gradients are there.

    Undoing the sums needs no gradients: done ahead of them, it would keep every branch's
    intermediate results until its own gradients are wanted. XLA does not heed this on CPUs: hence
    `_alone` on JAX, and `compiles` on TensorFlow.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.lax.optimization_barrier((streams, grads))[0]
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.control_dependencies(grads):
            return [tf.identity(stream) for stream in streams]
    return streams


def _within_autocast(x: Any) -> Any:
    """Decorate what is called later to run in the types that PyTorch's autocast sets now."""
    if keras.backend.backend() != "torch":
        return lambda function: function
    import torch

    device = x.device.type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled)


def _alone(function: Callable[..., Any], tensors: Sequence[Any], like: Any) -> Any:
    """JAX: `function(*tensors)`, shaped as `like`, as a computation that XLA mixes with no other.

    XLA starts early whatever needs no result that is still missing, shares it between branches, and
    keeps it until its last use; on CPUs it heeds no optimization barrier. But one side of a
    conditional runs, and frees its memory, as a whole. On other devices, which would wait for the
    host at each conditional, the barrier is enough.
    """
    import jax
    from jax.core import Tracer

    def run() -> Any:
        return function(*tensors)

    def zeros() -> Any:
        return keras.tree.map_structure(keras.ops.zeros_like, like)

    if not isinstance(tensors[0], Tracer) or jax.default_backend() != "cpu":
        return run()
    # A random number is always below 2, which XLA does not know.
    return jax.lax.cond(jax.lax.rng_uniform(0.0, 1.0, ()) < 2, run, zeros)


def _pull_back(function: Any, tensors: Tensors, grad: Any) -> tuple[Any, Sequence[Any]]:
    """Run `function`, and return its first result and the gradients of `tensors`, given `grad`."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def pull_jax(grad: Any, *tensors: Any) -> tuple[Any, Tensors]:
            delta, pull, _ = jax.vjp(function, *tensors, has_aux=True)
            return delta, pull(grad)

        return _alone(pull_jax, (grad, *tensors), (grad, tensors))
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            delta, _ = function(*tensors)
        zero = tf.UnconnectedGradients.ZERO
        return delta, tuple(tape.gradient(delta, tensors, grad, unconnected_gradients=zero))
    import torch

    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        delta, _ = function(*inputs)
    found = torch.autograd.grad(delta, inputs, grad, allow_unused=True, materialize_grads=True)
    return delta.detach(), found


def _with_gradient(
    forward: Callable[..., list[Any]],
    backward: Callable[..., list[Any]],
    num_differentiable: int,
    tensors: list[Any],
) -> Sequence[Any]:
    """`forward(*tensors)`, whose first two results replace the first two tensors in `backward`."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        @jax.custom_vjp
        def run(*tensors: Any) -> list[Any]:
            return forward(*tensors)

        def run_forward(*tensors: Any) -> tuple[list[Any], Any]:
            results = forward(*tensors, alone=True)
            return results, (*results[:2], *tensors[2:])

        def run_backward(kept: Any, grads: Any) -> tuple[Any, ...]:
            found = backward(kept, grads[:2])
            return (*found, *(None for _ in kept[num_differentiable:]))

        run.defvjp(run_forward, run_backward)
        return run(*tensors)
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.custom_gradient
        def run_tensorflow(*tensors: Any) -> tuple[list[Any], Any]:
            results = forward(*tensors)

            def gradient(*grads: Any) -> list[Any]:
                found = backward((*results[:2], *tensors[2:]), grads[:2])
                return [*found, *(None for _ in tensors[num_differentiable:])]

            return results, gradient

        return run_tensorflow(*(tf.convert_to_tensor(tensor) for tensor in tensors))
    import torch

    if not torch.is_grad_enabled():
        return forward(*tensors)
    return _torch_function().apply(forward, backward, num_differentiable, *tensors)


@functools.cache
def _torch_function() -> Any:
    import torch

    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, forward: Any, backward: Any, num_differentiable: int, *tensors: Any
        ) -> Any:
            results = forward(*tensors)
            ctx.backward, ctx.num_differentiable = backward, num_differentiable
            ctx.save_for_backward(*results[:2], *tensors[2:])
            # A state that no branch changed must not be returned as the input itself.
            after = [tensor.view_as(tensor) for tensor in results[2:]]
            ctx.mark_non_differentiable(*after)
            return (*results[:2], *after)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "A ReversibleStack cannot be differentiated twice on PyTorch: take the blocks "
                    "one by one, or remat=True. Received: a backward pass with create_graph=True"
                )
            saved = ctx.saved_tensors
            found = ctx.backward(saved, grads[:2])
            rest = len(saved) - ctx.num_differentiable
            return (None, None, None, *found, *(None,) * rest)

    return Reversible
