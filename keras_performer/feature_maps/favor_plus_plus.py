"""Positive random features that adapt to the lengths of queries and keys."""

import math
from typing import Any

import keras
from keras import ops

from keras_performer.feature_maps.feature_map import FeatureMap, num_key_heads, per_head


@keras.saving.register_keras_serializable(package="keras_performer")
class FavorPlusPlus(FeatureMap):
    """FAVOR++: an unbiased estimate of exp(q.k / sqrt(H)) whose variance suits the data.

    phi_i(x) = M^(-1/2) (1-4A)^(H/4) exp(A |w_i|^2 + sqrt(1-4A) w_i.x' - |x'|^2 / 2), with
    x' = x H^(-1/4) and w_i the rows of the projection. Any A <= 0 leaves the estimate unbiased, and
    0 is FAVOR+; a lower one damps the long rows, which make FAVOR+ vary where |q' + k'| is large.
    The best A follows from p, the mean of |q' + k'|^2 / H, which each key head estimates from
    moving averages of q', k' and their squares over the training steps. With `balanced`, dimension
    l of q' is multiplied, and that of k' divided, by Psi_l = (E k'_l^2 / E q'_l^2)^(1/4), which
    leaves q'.k' alone and makes p smaller.

    The averages are weights that `update_statistics` alone changes: features of a token never
    depend on the rest of its sequence, so causal use is causal. Before the first update the map is
    FAVOR+. An update changes the features, as a training step does, so a state or memory must be
    read with the averages that it was built with.

    **Args**
        num_features: Number of features M. None takes H ln(H) rounded up to a multiple of eight.
        projection: "orthogonal", "simplex" (lower variance still) or "iid" (the highest).
        trainable_projection: Whether the projection is trained, see `FeatureMap`.
        balanced: Whether to balance queries and keys by Psi: lower variance wherever their
            dimensions differ in size, at nearly no cost.
        momentum: What a moving average keeps at an update, in [0, 1). The averages are free of the
            bias toward zero: the first update makes them those of its batch.
        seed: Seeds the draw of the projection. None follows `keras.utils.set_random_seed`.

    **Shapes** (..., H) -> (..., M). An input of four axes or more has the key heads on axis 1, each
    with its own A and Psi; another one gets their average over the heads. Weights: `projection`
    (M, H); `query_mean`, `query_square`, `key_mean` and `key_square` (K, H), for K key heads if the
    map is built for keys (B, S, K, H), otherwise for all heads together, K = 1; `num_updates` ().

    **Masking** An update counts every query, and every key that is not masked. One in which some
    head has no key, or an average is not finite, is skipped.

    **Precision** The averages are float32. The logarithms of features leave this map in the type of
    its input, as in `FavorPlus`.

    **Cost** M H multiply-adds a token and head.

    **Raises** ValueError for sizes and options that cannot be.

    **Example**

    >>> feature_map = FavorPlusPlus(num_features=16, balanced=True, seed=0)
    >>> feature_map.build((None, None, 2, 8))
    >>> x = np.random.default_rng(0).normal(size=(3, 5, 2, 8)).astype("float32")
    >>> feature_map.update_statistics(x, x)
    >>> int(feature_map.num_updates)
    1

    **Source** Likhosherstov et al. 2022, arXiv 2205.15317 (FAVOR++); for `balanced`
    Likhosherstov et al. 2023, arXiv 2302.00787 (SADERF). They take the averages over the sequence
    at hand, which in causal use would let later tokens change earlier ones.
    """

    estimates_softmax = True
    log_space = True
    needs_projection = True

    def __init__(
        self,
        num_features: int | None = None,
        *,
        projection: str = "orthogonal",
        trainable_projection: bool = False,
        balanced: bool = False,
        momentum: float = 0.99,
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
        if not 0 <= momentum < 1:
            raise ValueError(
                f"momentum must be at least 0 and below 1. Received: momentum={momentum}"
            )
        self.balanced = balanced
        self.momentum = momentum

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Draw the projection, and make empty averages for the key heads of `input_shape`."""
        super().build(input_shape)
        shape = (num_key_heads(input_shape), input_shape[-1])
        self.query_mean = self._average("query_mean", shape)
        self.query_square = self._average("query_square", shape)
        self.key_mean = self._average("key_mean", shape)
        self.key_square = self._average("key_square", shape)
        self.num_updates = self.add_weight(
            name="num_updates",
            shape=(),
            initializer="zeros",
            trainable=False,
            dtype="int32",
            aggregation="only_first_replica",
        )

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Log features: (projected x, the token's constant); see `FeatureMap.features`."""
        rows, a, *balance = (ops.cast(operand, x.dtype) for operand in operands)
        a = per_head(a, x)
        for psi in balance:
            psi = per_head(psi, x)
            x = x * psi if is_query else x / psi
        head_dim = x.shape[-1]
        half_norm = 0.5 * head_dim**-0.5 * ops.sum(ops.square(x), axis=-1, keepdims=True)
        values = ops.matmul(x * ops.sqrt(1 - 4 * a), ops.transpose(rows * head_dim**-0.25))
        values = values + a * ops.sum(ops.square(rows), axis=-1)
        constant = 0.5 * math.log(rows.shape[0])
        return values, -half_norm - constant + 0.25 * head_dim * ops.log1p(-4 * a)

    def operands(self, key: Any, key_mask: Any) -> tuple[Any, ...]:
        """The projection, A (K, 1, 1) and, if balanced, Psi (K, 1, H); the last two as constants.

        Without an update all averages are zero, which gives A = 0 and Psi = 1.
        """
        del key, key_mask
        x, x2, y, y2 = (ops.convert_to_tensor(average) for average in self._averages())
        balance = ()
        if self.balanced:
            both = ops.logical_and(x2 > 0, y2 > 0)
            roots = (ops.power(ops.where(both, square, 1.0), 0.25) for square in (y2, x2))
            psi = ops.divide(*roots)
            x2, y2 = x2 * ops.square(psi), y2 / ops.square(psi)
            balance = (ops.stop_gradient(ops.expand_dims(psi, 1)),)
        p = ops.mean(x2 + y2 + 2 * x * y, axis=-1)
        a = (1 - 2 * p - ops.sqrt(ops.square(2 * p + 1) + 8 * p)) / 16
        a = ops.stop_gradient(ops.expand_dims(a, (1, 2)))
        return (ops.convert_to_tensor(self.projection), a, *balance)

    def update_statistics(self, query: Any, key: Any, key_mask: Any = None) -> None:
        """Move the averages toward those of a batch; see `FeatureMap.update_statistics`."""
        num_heads = self.query_mean.shape[0]
        if num_heads not in (1, key.shape[2]) or query.shape[2] % key.shape[2]:
            raise ValueError(
                f"This map keeps averages for {num_heads} key heads, and query heads must be a "
                "multiple of key heads (axis 2). Received: "
                f"query.shape={tuple(query.shape)}, key.shape={tuple(key.shape)}"
            )
        moments = (*_moments(query, None, num_heads), *_moments(key, key_mask, num_heads))
        usable = ops.all(ops.isfinite(ops.stack(moments)))
        steps = ops.cast(ops.stack([1, self.num_updates + 1]), "float32")
        missing = 1 - ops.power(self.momentum, steps)
        rate = missing[0] / missing[1]
        for average, moment in zip(self._averages(), moments, strict=True):
            average.assign_add(ops.where(usable, rate * (moment - average), 0.0))
        self.num_updates.assign_add(ops.cast(usable, "int32"))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {**super().get_config(), "balanced": self.balanced, "momentum": self.momentum}

    def _average(self, name: str, shape: tuple[int, ...]) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer="zeros",
            trainable=False,
            autocast=False,
            dtype="float32",
            aggregation="mean",
        )

    def _averages(self) -> tuple[keras.Variable, ...]:
        """In the order of `_moments` of the query and of the key."""
        return self.query_mean, self.query_square, self.key_mean, self.key_square


def _moments(x: Any, mask: Any, num_heads: int) -> tuple[Any, Any]:
    """The means of x' and of its square over all tokens (B, L, N, H) of a key head: (K, H) each.

    `mask` is None, (B, L) or (B, N, L). Not finite where a head has no token.
    """
    batch, length, num_all_heads, head_dim = ops.shape(x)
    grouped = (batch, length, num_heads, num_all_heads // num_heads)
    if mask is None:
        mask = ops.ones((batch, length), "bool")
    mask = ops.cast(mask, "bool")
    mask = ops.expand_dims(mask, -1) if len(mask.shape) == 2 else ops.swapaxes(mask, 1, 2)
    mask = ops.broadcast_to(mask, (batch, length, num_all_heads))
    mask = ops.reshape(mask, (*grouped, 1))
    x = ops.reshape(ops.stop_gradient(ops.cast(x, "float32")), (*grouped, head_dim))
    x = ops.where(mask, x * head_dim**-0.25, 0.0)
    count = ops.sum(ops.cast(mask, "float32"), axis=(0, 1, 3))
    mean, square = (ops.sum(t, axis=(0, 1, 3)) / count for t in (x, ops.square(x)))
    return mean, square
