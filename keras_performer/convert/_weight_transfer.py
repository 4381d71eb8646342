"""Named arrays of a checkpoint into the weights of a Keras model: all consumed, all filled."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np


class WeightTransfer:
    """Moves arrays, in the layout of PyTorch, into weights, and keeps account of both.

    Every array that is asked for must be there, with its shape. `finish` refuses what is left on
    either side. All that is wrong is told at once, in one error.

    **Args**
        tensors: Arrays by name.
        source: What errors call the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str):
        self._tensors = dict(tensors)
        self._source = source
        self._problems: list[str] = []
        self._filled: set[int] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Consume an array of this shape; zeros in place of one that is missing or misshaped."""
        array = self._tensors.pop(name, None)
        if array is None:
            self._problems.append(f"{name} {shape} is missing")
        elif array.shape != shape:
            self._problems.append(f"{name} has shape {array.shape}, expected {shape}")
        else:
            return array
        return np.zeros(shape, "float32")

    def take_copy(self, name: str, original: np.ndarray) -> None:
        """Consume an array that repeats another one, if it is there."""
        if name in self._tensors and not np.array_equal(self.take(name, original.shape), original):
            self._problems.append(f"{name} differs from the weight that it must share")

    def leave(self, *patterns: str) -> None:
        """Consume arrays, named by regular expressions, that the model has no place for."""
        for name in [n for n in self._tensors if any(re.fullmatch(p, n) for p in patterns)]:
            del self._tensors[name]

    def problem(self, text: str) -> None:
        """Note something else that is wrong."""
        self._problems.append(text)

    def assign(self, variable: Any, value: np.ndarray) -> None:
        """Fill a weight."""
        variable.assign(value)
        self._filled.add(id(variable))

    def move(self, name: str, variable: Any) -> np.ndarray:
        """Fill a weight with an array of its shape; return it."""
        value = self.take(name, tuple(variable.shape))
        self.assign(variable, value)
        return value

    def norm(self, name: str, layer: Any) -> None:
        """Fill a `LayerNormalization`."""
        self.move(f"{name}.weight", layer.gamma)
        self.move(f"{name}.bias", layer.beta)

    def dense(
        self,
        name: str,
        layer: Any,
        *,
        num_inputs: int = 1,
        bias: bool = True,
        order: np.ndarray | None = None,
    ) -> None:
        """Fill a `Dense` or `EinsumDense` layer from a matrix (outputs, inputs) and a vector.

        **Args**
            name: The name before ".weight" and ".bias".
            layer: A built layer.
            num_inputs: Number of leading axes of its kernel that are inputs.
            bias: Whether the checkpoint has the vector; the layer's gets zeros otherwise.
            order: The rows of matrix and vector, in the order of the layer's outputs.
        """
        shape = tuple(layer.kernel.shape)
        inputs, outputs = int(np.prod(shape[:num_inputs])), int(np.prod(shape[num_inputs:]))
        rows = np.arange(outputs) if order is None else order
        matrix = self.take(f"{name}.weight", (outputs, inputs))
        self.assign(layer.kernel, matrix[rows].T.reshape(shape))
        if layer.bias is not None:
            vector = self.take(f"{name}.bias", (outputs,)) if bias else np.zeros(outputs)
            self.assign(layer.bias, vector[rows].reshape(layer.bias.shape))

    def finish(self, model: Any) -> None:
        """Check that all weights of `model` are filled, and all arrays consumed.

        **Raises** ValueError that names what is wrong.
        """
        extra = [f"{name} {array.shape} is unknown" for name, array in self._tensors.items()]
        empty = [f"nothing fills {w.path}" for w in model.weights if id(w) not in self._filled]
        problems = [*self._problems, *extra, *empty]
        if problems:
            lines = "".join(f"\n- {problem}" for problem in problems)
            raise ValueError(
                "The tensors of this checkpoint are not those that its configuration asks for, so "
                f"nothing was imported. Received: {self._source} where{lines}"
            )
