"""The interface of a feature map."""

import math
import numbers
import operator
import random
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_performer.ops.projections import PROJECTIONS


def default_num_features(head_dim: int) -> int:
    """H ln(H), rounded up to a multiple of eight, at least eight.

    **Example**

    >>> default_num_features(64), default_num_features(1)
    (272, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, theorem 4: Theta(H log H) features.
    """
    return max(8, 8 * math.ceil(head_dim * math.log(head_dim) / 8))


def num_key_heads(input_shape: tuple[Any, ...]) -> int:
    """The number K of key heads in the shape (B, S, K, H) of keys; 1 where it does not say.

    **Example**

    >>> num_key_heads((None, None, 3, 8)), num_key_heads((None, 8))
    (3, 1)
    """
    is_known = len(input_shape) == 4 and isinstance(input_shape[2], int)
    return input_shape[2] if is_known else 1


def per_head(matrices: Any, x: Any) -> Any:
    """Give matrices (K, P, Q), one for each key head, the axes that broadcast against x.

    With four axes or more x is as attention passes it, (B, K, ..., L, H), and each head meets its
    own matrix. Any other x (..., L, H) has no heads and meets their average, (P, Q).

    **Raises** ValueError if axis 1 of x is not K.

    **Example**

    >>> tuple(per_head(np.ones((3, 5, 7)), np.ones((2, 3, 4, 11, 5))).shape)
    (3, 1, 5, 7)
    """
    rank, num_heads = len(x.shape), matrices.shape[0]
    if rank < 4:
        return ops.mean(matrices, axis=0)
    if num_heads > 1 and x.shape[1] != num_heads:
        raise ValueError(
            f"This feature map was built for {num_heads} key heads, which must be on axis 1: "
            f"(batch, key heads, ..., length, head size). Received: x of shape {tuple(x.shape)}"
        )
    return ops.reshape(matrices, (num_heads, *(1 for _ in range(rank - 4)), *matrices.shape[1:]))


def without_projection(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a map whose constructor has no arguments for a random projection.

    **Example**

    >>> without_projection({"name": "elu", "seed": None})
    {'name': 'elu'}
    """
    absent = ("num_features", "projection", "trainable_projection", "seed")
    return {name: value for name, value in config.items() if name not in absent}


class FeatureMap(keras.layers.Layer):
    """Map a query or key x to features phi(x) >= 0; attention weighs keys by phi(q).phi(k).

    A subclass implements `features` and says with `log_space` what it returns. The random
    projection, if there is one, is a weight: drawn at build from `seed`, saved with the model, not
    trained unless asked, drawn again only by `redraw`.

    **Args**
        num_features: Number of features M. None takes `default_num_features(H)`.
        projection: "orthogonal", "simplex" or "iid" rows, or None for none.
        trainable_projection: Whether the projection is trained from its random start. Trained rows
            are no Gaussian vectors, so what is estimated then is a kernel that the data chose.
        seed: Seeds the draw. None follows `keras.utils.set_random_seed`.

    **Shapes** Called on (..., H) it returns phi, (..., M), for inspection; attention uses
    `features`, which keeps the scale apart.

    **Precision** Computed in the type of its input; attention passes float32 or wider.

    **Example** A map of one's own, registered because each layer makes its copy from the config;
    `GeneralizedKernel` makes one of a function.

    >>> @keras.saving.register_keras_serializable()
    ... class Softplus(FeatureMap):
    ...     def features(self, x, operands, *, is_query):
    ...         return keras.ops.softplus(x), None
    >>> layer = keras_performer.layers.PerformerAttention(2, 4, feature_map=Softplus())
    >>> x = np.ones((1, 5, 8), "float32")
    >>> tuple(layer(x, x).shape)
    (1, 5, 8)
    """

    estimates_softmax: bool = False
    """Whether phi(q).phi(k) estimates exp(q.k / sqrt(H))."""
    log_space: bool = False
    """Whether `features` returns logarithms."""
    supports_state: bool = True
    """Whether features of a key depend on that key alone."""
    needs_projection: bool = False
    """Whether the map is nothing without a projection."""
    causal_key_sum: float = 0.0
    """What causal attention starts its key sum from; other than zero only to imitate a peer."""

    def __init__(
        self,
        num_features: int | None = None,
        *,
        projection: str | None = None,
        trainable_projection: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        is_int = isinstance(num_features, numbers.Integral)
        if num_features is not None and (not is_int or num_features < 1):
            raise ValueError(
                "num_features must be a positive integer, or None for the default. "
                f"Received: num_features={num_features}"
            )
        if projection is None and self.needs_projection:
            raise ValueError(
                f"{type(self).__name__} needs a projection, one of {sorted(PROJECTIONS)}. "
                "Received: projection=None"
            )
        if projection is not None and projection not in PROJECTIONS:
            raise ValueError(
                f"projection must be one of {sorted(PROJECTIONS)} or None. "
                f"Received: projection={projection!r}"
            )
        if trainable_projection and projection is None:
            raise ValueError(
                "There is no projection to train: set projection='orthogonal' or "
                "trainable_projection=False. Received: projection=None, trainable_projection=True"
            )
        self.num_features = None if num_features is None else int(num_features)
        self.projection_kind = projection
        self.trainable_projection = trainable_projection
        self.seed = seed
        self.head_dim: int | None = None
        self.feature_dim: int | None = None
        self.projection = None

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Compute features of x (..., L, H) from explicit operands.

        Pure: every tensor it reads is x or among `operands`, so that gradients reach them.

        Returns:
            A pair. With `log_space` it is (values (..., L, M), offset (..., L, 1)), where
            phi = exp(values + offset); otherwise (phi, None).
        """
        raise NotImplementedError

    def operands(self, key: Any, key_mask: Any) -> tuple[Any, ...]:
        """The tensors that `features` needs beside x: the weights.

        Args:
            key: (B, K, S, H), zero where masked.
            key_mask: None or boolean (B, K or 1, S).
        """
        del key, key_mask
        return tuple(ops.convert_to_tensor(weight) for weight in self.weights)

    def update_statistics(self, query: Any, key: Any, key_mask: Any = None) -> None:
        """Let the queries and keys of a training step into the map's statistics.

        Attention calls this in training. Most maps keep no statistics and do nothing; one that
        adapts its features to the distribution of its inputs keeps moving averages of it as
        non-trainable weights, so that features never depend on the sequence that they serve.

        Args:
            query: (B, T, N, H), not scaled. N is a multiple of K, and query head n belongs to key
                head n // (N/K).
            key: (B, S, K, H), not scaled.
            key_mask: None, or (B, S) or (B, K, S), True or nonzero where a key takes part.
        """
        del query, key, key_mask

    def redraw(self, seed: int) -> None:
        """Replace the projection by the one that a new map of this `seed` would draw.

        States and memories that were built with the old projection are worthless afterwards.

        Raises:
            ValueError: The map has no random projection, or is not built yet.
        """
        if self.projection is None:
            raise ValueError(
                "Only a built map with a random projection can be redrawn. Received: "
                f"{type(self).__name__} with projection={self.projection_kind!r}, "
                f"built={self.built}"
            )
        self.projection.assign(self._rows(self.projection.shape, operator.index(seed)))

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Draw the projection for head size `input_shape[-1]`."""
        head_dim = input_shape[-1]
        if not isinstance(head_dim, int) or head_dim < 1:
            raise ValueError(
                "The head size (last axis) must be a positive integer. "
                f"Received: input_shape={input_shape}"
            )
        self.head_dim = head_dim
        self.feature_dim = self._resolve_num_features(head_dim)
        if self.projection_kind is not None:
            self.projection = self.add_weight(
                name="projection",
                shape=(self._num_rows(self.feature_dim), head_dim),
                initializer=self._draw,
                trainable=self.trainable_projection,
                autocast=False,
            )
        self.built = True

    def call(self, x: Any, is_query: bool = False) -> Any:
        """Return phi(x), (..., H) -> (..., M)."""
        values, offset = self.features(x, self.operands(x, None), is_query=is_query)
        return values if offset is None else ops.exp(values + offset)

    def compute_output_shape(self, input_shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """(..., H) -> (..., M)."""
        return (*input_shape[:-1], self._resolve_num_features(input_shape[-1]))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "num_features": self.num_features,
            "projection": self.projection_kind,
            "trainable_projection": self.trainable_projection,
            "seed": self.seed,
        }

    def _resolve_num_features(self, head_dim: int) -> int:
        if self.projection_kind is None:
            return head_dim
        return self.num_features or default_num_features(head_dim)

    def _num_rows(self, num_features: int) -> int:
        """Rows of the projection; a map with two features a row has half as many."""
        return num_features

    def _draw(self, shape: tuple[int, int], dtype: Any = None) -> Any:
        seed = random.randrange(2**31) if self.seed is None else self.seed
        return ops.convert_to_tensor(self._rows(shape, seed), dtype=dtype)

    def _rows(self, shape: tuple[int, int], seed: int) -> np.ndarray:
        return self._project(*shape, np.random.default_rng(seed))

    def _project(self, num_rows: int, head_dim: int, rng: np.random.Generator) -> np.ndarray:
        return PROJECTIONS[self.projection_kind or "iid"](num_rows, head_dim, rng)
