"""Gradients of a scalar function, and whole compiled functions, on whichever backend runs."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from tolerances import to_numpy

from keras_performer.ops import favor_attention
from keras_performer.ops.favor_attention import IMPLEMENTATIONS


def gradients(fn: Callable[..., Any], *arrays: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """The value of `fn(*tensors)`, a scalar, and its gradient by every array.

    `fn` must be pure and build nothing: under JAX it is compiled, as in `compiled`. An array that
    `fn` does not depend on has a gradient of zeros. Weights that `fn` closes over are constants;
    to differentiate by one, pass its value and read the argument.
    """
    tensors = [keras.ops.convert_to_tensor(array) for array in arrays]
    backend = keras.config.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = fn(*tensors)
        grads = tape.gradient(value, tensors, unconnected_gradients="zero")
    elif backend == "jax":
        import jax

        differentiate = jax.value_and_grad(fn, argnums=tuple(range(len(tensors))))
        value, grads = compiled(differentiate)(*tensors)
    elif backend == "torch":
        import torch

        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        with torch.enable_grad():
            value = fn(*tensors)
            grads = torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True)
    else:
        raise ValueError(f"No gradients for this backend. Received: {backend}")
    assert value.shape == (), f"fn must return a scalar, not {tuple(value.shape)}"
    return to_numpy(value), [to_numpy(grad) for grad in grads]


def value_of(fn: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """The value of `fn(*tensors)` alone, as NumPy: for a difference quotient."""
    return to_numpy(fn(*[keras.ops.convert_to_tensor(array) for array in arrays]))


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of arrays, compiled as a whole under JAX, and as it is elsewhere.

    JAX compiles single operators for every new shape, so a test of many shapes spends its time
    there; a whole function, not optimized, compiles in a tenth of it. `fn` must be pure and build
    nothing.
    """
    if keras.config.backend() != "jax":
        return fn
    import jax

    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def call(fn: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """`fn(*arrays, **options)`, compiled as a whole under JAX, once for each fn and settings.

    Options that are tensors or hold them are arguments of the compiled function; numbers, strings
    and layers are settings. `fn` must draw no random numbers.
    """
    if isinstance(fn, keras.layers.Layer) and not fn.built:
        fn(*arrays, **options)
    settings = {
        name: option
        for name, option in options.items()
        if option is None or isinstance(option, bool | int | float | str | keras.layers.Layer)
    }
    tensors = {name: option for name, option in options.items() if name not in settings}
    return _with_settings(fn, tuple(sorted(settings.items())))(arrays, tensors)


@functools.cache
def _with_settings(fn: Callable[..., Any], settings: tuple[tuple[str, Any], ...]) -> Any:
    return compiled(lambda arrays, tensors: fn(*arrays, **dict(settings), **tensors))


def forget_compiled() -> None:
    """Let go of the functions that `call` compiled."""
    _with_settings.cache_clear()


def attend(query: Any, key: Any, value: Any, feature_map: Any, **options: Any) -> Any:
    """`favor_attention` through `call`."""
    if not feature_map.built:
        feature_map.build(key.shape)
    return call(favor_attention, query, key, value, feature_map=feature_map, **options)


def attention_gradients(
    query: Any, key: Any, value: Any, feature_map: Any, cotangent: Any, **options: Any
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The output of `favor_attention`, and the gradients of its sum weighted by `cotangent`.

    Those are by query, key and value. The output is the gradient by the cotangent itself, so that
    JAX compiles once for both.
    """
    if not feature_map.built:
        feature_map.build(key.shape)

    def weighted_sum(cotangent: Any, *arrays: Any) -> Any:
        output = favor_attention(*arrays, feature_map, **options)
        return keras.ops.sum(keras.ops.multiply(output, cotangent))

    _, (output, *found) = gradients(weighted_sum, cotangent, query, key, value)
    return output, found


def implementations(
    exact_window: int | None = None, segmented: bool = False, stateful: bool = False
) -> list[str]:
    """The implementations of `favor_attention` that can run calls of this kind."""
    kind = {"exact_window": exact_window, "segmented": segmented, "stateful": stateful}
    return [name for name, module in IMPLEMENTATIONS.items() if module.why_not(**kind) is None]
