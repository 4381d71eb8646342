"""Positive orthogonal random features for the softmax kernel."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_performer.feature_maps.feature_map import FeatureMap
from keras_performer.ops.projections import with_constant_norm


@keras.saving.register_keras_serializable(package="keras_performer")
class FavorPlus(FeatureMap):
    """Positive random features, an unbiased estimate of exp(q.k / sqrt(H)): FAVOR+.

    phi_i(x) = M^(-1/2) exp(w_i.x' - |x'|^2 / 2) with x' = x H^(-1/4) and w_i the rows of the
    projection. The relative variance of an estimate is at most (exp(|q' + k'|^2) - 1) / M, so it
    serves where |q' + k'|^2 is within a few units of ln(M); see `qk_norm` of `PerformerAttention`.

    **Args**
        num_features: Number of features M, even if `hyperbolic`. None takes H ln(H) rounded up to
            a multiple of eight, at least eight.
        projection: "orthogonal", "simplex" (lower variance still) or "iid" (the highest).
        trainable_projection: Whether the projection is trained, see `FeatureMap`.
        hyperbolic: Use exp(w.x') and exp(-w.x') of M/2 rows; the variance is lower at equal M for
            short vectors, by the odd terms that cancel.
        regularized: Scale every row to norm sqrt(H) (SMREG): lower variance, biased downward.
        legacy_epsilon: To run weights trained with an implementation that adds an epsilon to
            features divided by a maximum over the *whole sequence*: its epsilon, or a pair of it
            and the epsilon that it adds to the causal key sum. google-research is 1e-6,
            performer-pytorch (1e-4, 1e-6). It pulls attention toward the plain average, in causal
            use **later keys change earlier outputs**, and there is no state. Otherwise None.
        seed: Seeds the draw of the projection. None follows `keras.utils.set_random_seed`.

    **Shapes** (..., H) -> (..., M). Weight: `projection` (M, H), or (M/2, H) if hyperbolic.

    **Precision** The logarithms of features leave this map in the type of its input; whoever
    exponentiates them keeps the scale, so nothing overflows.

    **Cost** M H multiply-adds a token and head.

    **Raises** ValueError for sizes and options that cannot be.

    **Example**

    >>> feature_map = FavorPlus(num_features=16, seed=0)
    >>> tuple(feature_map(np.ones((2, 8), "float32")).shape)
    (2, 16)

    **Source** Choromanski et al. 2021, arXiv 2009.14794: lemma 1 (positive and hyperbolic),
    theorem 3 (regularised), section 2.4 (orthogonal).
    """

    needs_projection = True

    def __init__(
        self,
        num_features: int | None = None,
        *,
        projection: str = "orthogonal",
        trainable_projection: bool = False,
        hyperbolic: bool = False,
        regularized: bool = False,
        legacy_epsilon: float | tuple[float, float] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if hyperbolic and num_features is not None and num_features % 2:
            raise ValueError(
                "A hyperbolic map has two features for each row of the projection, so num_features "
                f"must be even. Received: num_features={num_features}"
            )
        super().__init__(
            num_features,
            projection=projection,
            trainable_projection=trainable_projection,
            seed=seed,
            **kwargs,
        )
        self.hyperbolic = hyperbolic
        self.regularized = regularized
        self.legacy_epsilon = legacy_epsilon
        if legacy_epsilon is None:
            self.log_space, self.estimates_softmax = True, True
            return
        pair = legacy_epsilon
        if not isinstance(pair, (tuple, list)):
            pair = (pair, 0.0)
        if len(pair) != 2 or not all(isinstance(e, (int, float)) and e >= 0 for e in pair):
            raise ValueError(
                "legacy_epsilon must be None, a number >= 0, or a pair of them. "
                f"Received: legacy_epsilon={legacy_epsilon!r}"
            )
        if hyperbolic:
            raise ValueError(
                "No implementation adds an epsilon to hyperbolic features: set hyperbolic=False or "
                f"legacy_epsilon=None. Received: legacy_epsilon={legacy_epsilon!r}"
            )
        self._feature_epsilon, self.causal_key_sum = (float(e) for e in pair)
        self.supports_state = False

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Log features: (projected x, the token's constant); see `FeatureMap.features`."""
        head_dim = x.shape[-1]
        rows = ops.cast(operands[0], x.dtype) * head_dim**-0.25
        values = ops.matmul(x, ops.transpose(rows))
        half_norm = 0.5 * head_dim**-0.5 * ops.sum(ops.square(x), axis=-1, keepdims=True)
        if self.legacy_epsilon is not None:
            largest = operands[1]
            if is_query:
                largest = ops.stop_gradient(ops.max(values, axis=-1, keepdims=True))
            phi = ops.exp(values - half_norm - largest) + self._feature_epsilon
            return phi * rows.shape[0] ** -0.5, None
        if self.hyperbolic:
            values = ops.concatenate([values, -values], axis=-1)
        return values, -half_norm - 0.5 * math.log(values.shape[-1])

    def operands(self, key: Any, key_mask: Any) -> tuple[Any, ...]:
        """The projection; with `legacy_epsilon` also the largest projected key, (B, K, 1, 1)."""
        operands = super().operands(key, key_mask)
        if self.legacy_epsilon is None:
            return operands
        rows = ops.cast(operands[0], key.dtype) * key.shape[-1] ** -0.25
        values = ops.matmul(key, ops.transpose(rows))
        if key_mask is not None:
            values = ops.where(ops.expand_dims(key_mask, -1), values, -1e30)
        largest = ops.stop_gradient(ops.max(values, axis=(-2, -1), keepdims=True))
        # Of a row without keys: any number will do, but none that overflows, as its gradient would.
        return (*operands, ops.where(largest > -1e29, largest, 0.0))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "hyperbolic": self.hyperbolic,
            "regularized": self.regularized,
            "legacy_epsilon": self.legacy_epsilon,
        }

    def _num_rows(self, num_features: int) -> int:
        return num_features // 2 if self.hyperbolic else num_features

    def _project(self, num_rows: int, head_dim: int, rng: np.random.Generator) -> np.ndarray:
        rows = super()._project(num_rows, head_dim, rng)
        return with_constant_norm(rows) if self.regularized else rows
