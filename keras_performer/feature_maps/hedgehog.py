"""Learned features that mimic softmax attention."""

from typing import Any

import keras
from keras import ops

from keras_performer.feature_maps.feature_map import (
    FeatureMap,
    num_key_heads,
    per_head,
    without_projection,
)


@keras.saving.register_keras_serializable(package="keras_performer")
class Hedgehog(FeatureMap):
    """Features softmax([W x, -W x]) with a W that is trained: Hedgehog.

    Nothing is random: W starts as the identity and each key head learns its own, from the task or,
    when a softmax model is converted, by matching that model's attention weights
    (`keras_performer.ops.favor_attention_weights` gives this map's). The features are products of
    exponentials, so attention can become as spiky as softmax's. But phi(q).phi(k) is whatever the
    training made it, at first not even near exp(q.k / sqrt(H)), so it does not count as an estimate
    of softmax: `exact_window`, which would add the two, refuses it.

    **Shapes** (..., H) -> (..., 2 H). An input of four axes or more has the key heads on axis 1,
    each with its own W; another one gets the average W of the heads. Weight: `learned_projection`
    (K, H, H), for K key heads if the map is built for keys (B, S, K, H), otherwise one for all.

    **Precision** Logarithms of features leave this map, so no x is too large.

    **Cost** H^2 multiply-adds a token and head, and attention on 2 H features.

    **Raises** ValueError for an input whose axis 1 is not K.

    **Example**

    >>> phi = Hedgehog()(np.array([[0.0, 2.0]], "float32"))
    >>> keras.ops.convert_to_numpy(phi).round(2)
    array([[0.1 , 0.78, 0.1 , 0.01]], dtype=float32)

    **Source** Zhang et al. 2024, arXiv 2402.04347. We share W between queries and keys,
    and have no bias; the paper learns the two apart.
    """

    log_space = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(None, projection=None, seed=None, **kwargs)

    def build(self, input_shape: tuple[Any, ...]) -> None:
        """Make an identity matrix for each key head of `input_shape`."""
        super().build(input_shape)
        num_heads, head_dim = num_key_heads(input_shape), input_shape[-1]
        self.learned_projection = self.add_weight(
            name="learned_projection",
            shape=(num_heads, head_dim, head_dim),
            # Copies: PyTorch cannot assign to an array whose entries share memory.
            initializer=lambda shape, dtype: ops.tile(
                ops.eye(head_dim, dtype=dtype), (shape[0], 1, 1)
            ),
            autocast=False,
            dtype="float32",
        )

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Log features, the same for queries and keys; see `FeatureMap.features`."""
        matrix = per_head(ops.cast(operands[0], x.dtype), x)
        values = ops.matmul(x, ops.swapaxes(matrix, -1, -2))
        values = ops.concatenate([values, -values], axis=-1)
        return values, -ops.logsumexp(values, axis=-1, keepdims=True)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return without_projection(super().get_config())

    def _resolve_num_features(self, head_dim: int) -> int:
        return 2 * head_dim
