"""The random Fourier features that positive features replaced."""

from typing import Any

import keras
from keras import ops

from keras_performer.feature_maps.feature_map import FeatureMap


@keras.saving.register_keras_serializable(package="keras_performer")
class Trigonometric(FeatureMap):
    """Sines and cosines that estimate exp(q.k / sqrt(H)): **only to reproduce a figure**.

    phi(x) = exp(|x'|^2 / 2) (M/2)^(-1/2) [cos(W x'), sin(W x')] with x' = x H^(-1/4). The estimate
    is unbiased, and useless for attention, which is the point of the paper's comparison:

    * Features and estimates may be negative. So may the sum of a query's weights, and the op, which
      divides only by what is positive, then returns zeros for that query.
    * Where that sum is positive but small, the quotient lies far outside of the values, without
      bound. The relative variance, about exp(|q' - k'|^2) / M for tokens that are far apart, is
      largest where the kernel is smallest, and attention has many such pairs.
    * exp(|x'|^2 / 2) has no scale to travel beside it: float32 overflows once |q'|^2 + |k'|^2
      passes 177, and training diverges long before.

    `implementation="reference"` and `favor_attention_weights` work with logarithms and take a
    negative weight for zero, so they do not agree with the chunked implementation here. Use
    `FavorPlus`.

    **Args**
        num_features: Number of features M, two for each of the M/2 rows, so even.
        projection: "orthogonal", "simplex" or "iid".
        seed: Seeds the draw of the projection. None follows `keras.utils.set_random_seed`.

    **Shapes** (..., H) -> (..., M). Weight: `projection` (M/2, H).

    **Precision** Plain sums of features in float32; see above.

    **Cost** M H / 2 multiply-adds a token and head.

    **Raises** ValueError for sizes and options that cannot be.

    **Example**

    >>> import math
    >>> phi = Trigonometric(64, seed=0)(np.full((1, 4), 2.0, "float32"))
    >>> bool(keras.ops.any(phi < 0)), round(float(keras.ops.sum(phi * phi)) / math.exp(8), 4)
    (True, 1.0)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, section 2.3 and figure 2; Rahimi and Recht
    2007.
    """

    needs_projection = True

    def __init__(
        self,
        num_features: int | None = None,
        *,
        projection: str = "orthogonal",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if num_features is not None and num_features % 2:
            raise ValueError(
                "A sine and a cosine share a row of the projection, so num_features must be even. "
                f"Received: num_features={num_features}"
            )
        super().__init__(num_features, projection=projection, seed=seed, **kwargs)

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Plain features of either sign, the same for queries and keys."""
        head_dim = x.shape[-1]
        rows = ops.cast(operands[0], x.dtype)
        angles = ops.matmul(x, ops.transpose(rows * head_dim**-0.25))
        half_norm = 0.5 * head_dim**-0.5 * ops.sum(ops.square(x), axis=-1, keepdims=True)
        waves = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
        return ops.exp(half_norm) * waves * rows.shape[0] ** -0.5, None

    def _num_rows(self, num_features: int) -> int:
        return num_features // 2
