"""Run a layer so that its backward pass computes it again instead of keeping its results."""

from collections.abc import Callable, Sequence
from typing import Any

import keras


def recomputed(
    function: Callable[..., Any], variables: Sequence[keras.Variable], *tensors: Any
) -> Any:
    """Return `function(*tensors)`, of which only the tensors are kept for the backward pass.

    `keras.remat` alone would draw other random numbers the second time on the TensorFlow and
    PyTorch backends, where the states of seed generators have moved on by then, and the gradients
    would be those of another function. Here every variable is an argument, and the states that the
    first run leaves behind are assigned once, after it.

    **Args**
        function: Computes tensors from tensors and `variables`.
        variables: All that `function` reads or changes.
        *tensors: Its arguments, floating point.

    **Returns** What `function` returns.

    **Example**

    >>> dense = keras.layers.Dense(3)
    >>> dense.build((None, 2))
    >>> tuple(recomputed(dense, dense.variables, keras.ops.ones((5, 2))).shape)
    (5, 3)

    **Source** Chen et al. 2016, arXiv 1604.06174.
    """
    changing = [v for v in variables if not v.trainable]
    lasting = [v for v in variables if v.trainable]
    # Copied, because PyTorch assigns in place.
    states = [keras.ops.copy(v) for v in changing]
    # Read: TensorFlow counts the gradient of a variable among the arguments twice, run eagerly.
    weights = [keras.ops.reshape(v, v.shape) for v in lasting]
    run = pure(function, lasting, changing)

    def from_states(weights: Sequence[Any], *tensors: Any) -> tuple[Any, list[Any]]:
        return run(states, weights, *tensors)  # no arguments: integers have no gradient

    outputs, after = keras.remat(from_states)(weights, *tensors)
    for variable, value in zip(changing, after, strict=True):
        variable.assign(value)
    return outputs


def pure(
    function: Callable[..., Any],
    lasting: Sequence[keras.Variable],
    changing: Sequence[keras.Variable],
) -> Callable[..., tuple[Any, list[Any]]]:
    """Turn `function(*tensors)` into one of its variables too.

    **Args**
        function: Computes tensors from tensors and variables.
        lasting: Variables that it reads.
        changing: Variables that it may assign.

    **Returns** A function of the values of `changing`, those of `lasting`, and the tensors. It
    returns what `function` does and the values that it leaves in `changing`, and assigns nothing.

    **Example**

    >>> dense = keras.layers.Dense(3)
    >>> dense.build((None, 2))
    >>> zeros = [keras.ops.zeros((2, 3)), keras.ops.zeros((3,))]
    >>> outputs, _ = pure(dense, dense.variables, [])([], zeros, keras.ops.ones((1, 2)))
    >>> float(keras.ops.sum(outputs))
    0.0
    """

    def run(states: Sequence[Any], weights: Sequence[Any], *tensors: Any) -> tuple[Any, list[Any]]:
        mapping = zip([*changing, *lasting], [*states, *weights], strict=True)
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = function(*tensors)
        after = (scope.get_current_value(v) for v in changing)
        return outputs, [s if new is None else new for s, new in zip(states, after, strict=True)]

    return run
