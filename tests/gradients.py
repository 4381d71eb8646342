"""Gradients of a scalar function, and whole compiled functions, on whichever backend runs."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from tolerances import to_numpy

from keras_performer.ops import favor_attention


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


@functools.lru_cache(maxsize=None)
def _attend(feature_map: Any, options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    def fn(query: Any, key: Any, value: Any, arrays: dict[str, Any]) -> Any:
        return favor_attention(query, key, value, feature_map, **dict(options), **arrays)

    return compiled(fn)


def attend(query: Any, key: Any, value: Any, feature_map: Any, **options: Any) -> Any:
    """`favor_attention`, compiled as a whole under JAX, once for each map, options and shapes."""
    arrays = {
        name: options.pop(name)
        for name in ("key_mask", "segment_ids", "initial_state")
        if options.get(name) is not None
    }
    if not feature_map.built:
        feature_map.build(key.shape)
    options = {name: value for name, value in options.items() if value is not None}
    return _attend(feature_map, tuple(sorted(options.items())))(query, key, value, arrays)
