"""The paper's generalized attention: any non-negative function as a kernel."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_performer.feature_maps.feature_map import FeatureMap


@keras.saving.register_keras_serializable(package="keras_performer")
class GeneralizedKernel(FeatureMap):
    """Features f(W x) + epsilon of a function f >= 0 that you choose.

    Use it for a kernel of your own, or to reproduce one: google-research takes f(x) without
    projection and scale, performer-pytorch f(W x H^(-1/4)).

    **Args**
        fn: A pure, elementwise function of a tensor, non-negative everywhere, or the name of a
            Keras activation. For a layer or a model, register the function with
            `keras.saving.register_keras_serializable`: they keep the map as its config. Tensors
            that it closes over get no gradient.
        num_features: Number of features M. Needs a projection; without one M = H.
        projection: "orthogonal", "simplex", "iid" or None.
        trainable_projection: Whether the projection is trained, see `FeatureMap`.
        scale_inputs: Whether x is multiplied by H^(-1/4) first.
        kernel_epsilon: Added to every feature. It mixes in the plain average, so it is part of the
            kernel. With 0 a query whose features are all zero gets zeros.
        seed: Seeds the draw of the projection.

    **Shapes** (..., H) -> (..., M).

    **Precision** Plain sums of features in float32: keep f(W x) below about 1e15.

    **Cost** M H multiply-adds a token and head with a projection, none without.

    **Raises** ValueError where `fn` is negative or not finite on a grid from -8 to 8.

    **Example**

    >>> squared = GeneralizedKernel(lambda x: x * x, kernel_epsilon=0.0)
    >>> float(squared(np.array([[1.0, -2.0]], "float32"))[0, 1])
    4.0

    **Source** Choromanski et al. 2021, arXiv 2009.14794, section 2.2 and appendix D.
    """

    def __init__(
        self,
        fn: Callable[[Any], Any] | str,
        num_features: int | None = None,
        *,
        projection: str | None = None,
        trainable_projection: bool = False,
        scale_inputs: bool = False,
        kernel_epsilon: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        check = kwargs.pop("_check", True)
        super().__init__(
            num_features,
            projection=projection,
            trainable_projection=trainable_projection,
            seed=seed,
            **kwargs,
        )
        if num_features is not None and projection is None:
            raise ValueError(
                "Without a projection the number of features is the head size: set "
                "projection='orthogonal' or num_features=None. "
                f"Received: num_features={num_features}"
            )
        if kernel_epsilon < 0:
            raise ValueError(
                f"kernel_epsilon must not be negative. Received: kernel_epsilon={kernel_epsilon}"
            )
        self.fn = keras.activations.get(fn)
        self.scale_inputs = scale_inputs
        self.kernel_epsilon = kernel_epsilon
        if not check:
            return
        grid = np.linspace(-8.0, 8.0, 257, dtype="float32")
        on_grid = ops.convert_to_numpy(self.fn(ops.convert_to_tensor(grid))) + kernel_epsilon
        if on_grid.shape != grid.shape or not np.all(np.isfinite(on_grid)) or on_grid.min() < 0:
            raise ValueError(
                "A kernel needs an elementwise function that is finite and not negative; try its "
                f"square or add a constant. Received: fn={fn!r}, whose smallest value between -8 "
                f"and 8 is {on_grid.min():.4g} with kernel_epsilon={kernel_epsilon}"
            )

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Plain features, the same for queries and keys; see `FeatureMap.features`."""
        if self.scale_inputs:
            x = x * x.shape[-1] ** -0.25
        if operands:
            x = ops.matmul(x, ops.transpose(ops.cast(operands[0], x.dtype)))
        return self.fn(x) + self.kernel_epsilon, None

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "fn": keras.saving.serialize_keras_object(self.fn),
            "scale_inputs": self.scale_inputs,
            "kernel_epsilon": self.kernel_epsilon,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GeneralizedKernel":
        """Rebuild from `get_config()`."""
        fn = keras.saving.deserialize_keras_object(config["fn"])
        # It was checked where the config comes from, and a trace has no values to look at.
        return cls(**{**config, "fn": fn, "_check": False})
