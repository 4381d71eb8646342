"""The ReLU kernel, the paper's default for generalized attention."""

from typing import Any

import keras
from keras import ops

from keras_performer.feature_maps.feature_map import FeatureMap


@keras.saving.register_keras_serializable(package="keras_performer")
class ReLU(FeatureMap):
    """Features max(W x, 0) + epsilon: cheap, trains well from scratch, is not softmax.

    **Args**
        num_features: Number of features M. None takes H ln(H) rounded up to a multiple of eight.
        projection: "orthogonal", "simplex", "iid", or None for max(x, 0) with M = H.
        trainable_projection: Whether the projection is trained, see `FeatureMap`.
        kernel_epsilon: Added to every feature; with 0 a query whose features are all zero gets
            zeros.
        seed: Seeds the draw of the projection.

    **Shapes** (..., H) -> (..., M). **Cost** M H multiply-adds a token and head, none without
    projection. **Precision** float32 sums. **Raises** ValueError for sizes that cannot be.

    **Example**

    >>> phi = ReLU(projection=None, kernel_epsilon=0.5)(np.array([[1.0, -1.0]], "float32"))
    >>> float(phi[0, 1])
    0.5

    **Source** Choromanski et al. 2021, arXiv 2009.14794, section 2.2 and appendix D.4, where the
    default is an epsilon of 1e-3.
    """

    def __init__(
        self,
        num_features: int | None = None,
        *,
        projection: str | None = "orthogonal",
        trainable_projection: bool = False,
        kernel_epsilon: float = 1e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
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
        self.kernel_epsilon = kernel_epsilon

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Plain features, the same for queries and keys; see `FeatureMap.features`."""
        if operands:
            x = ops.matmul(x, ops.transpose(ops.cast(operands[0], x.dtype)))
        return ops.relu(x) + self.kernel_epsilon, None

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "kernel_epsilon": self.kernel_epsilon}
