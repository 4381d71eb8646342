"""Feature maps: what turns a query or a key into features."""

from typing import Any

import keras

from keras_performer.feature_maps.elu import ELU
from keras_performer.feature_maps.favor_plus import FavorPlus
from keras_performer.feature_maps.favor_plus_plus import FavorPlusPlus
from keras_performer.feature_maps.feature_map import FeatureMap, default_num_features
from keras_performer.feature_maps.generalized_kernel import GeneralizedKernel
from keras_performer.feature_maps.hedgehog import Hedgehog
from keras_performer.feature_maps.relu import ReLU
from keras_performer.feature_maps.trigonometric import Trigonometric

__all__ = [
    "ELU",
    "FavorPlus",
    "FavorPlusPlus",
    "FeatureMap",
    "GeneralizedKernel",
    "Hedgehog",
    "ReLU",
    "Trigonometric",
    "default_num_features",
    "get",
]

_NAMES = {
    "elu": ELU,
    "favor_plus": FavorPlus,
    "favor_plus_plus": FavorPlusPlus,
    "hedgehog": Hedgehog,
    "relu": ReLU,
}


def get(
    identifier: str | dict[str, Any] | FeatureMap,
    *,
    num_features: int | None = None,
    seed: int | None = None,
    dtype: Any = None,
) -> FeatureMap:
    """Make a new, unbuilt feature map from a name, a config or an instance.

    **Args**
        identifier: "favor_plus", "favor_plus_plus", "hedgehog", "relu" or "elu"; a serialized
            feature map; or an instance, whose configuration is copied, so that no two layers share
            a projection by accident.
        num_features: Number of features, for a name. A config or an instance brings its own.
        seed: Seed, for a name.
        dtype: The policy of the map, for a name.

    **Raises** ValueError for an unknown name, or for `num_features` beside a config or an instance
    or for a map that has a fixed number of them.

    **Example**

    >>> get("favor_plus", num_features=64).num_features
    64
    """
    if isinstance(identifier, str):
        if identifier not in _NAMES:
            raise ValueError(
                f"feature_map must be one of {sorted(_NAMES)} or a FeatureMap such as "
                f"GeneralizedKernel(fn). Received: feature_map={identifier!r}"
            )
        if identifier in ("elu", "hedgehog"):
            if num_features is not None:
                raise ValueError(
                    f"The number of features of the {identifier} map follows from the head size: "
                    f"leave num_features=None. Received: num_features={num_features}"
                )
            return _NAMES[identifier](dtype=dtype)
        return _NAMES[identifier](num_features, seed=seed, dtype=dtype)
    if num_features is not None:
        raise ValueError(
            "A FeatureMap brings its own number of features: leave num_features=None. "
            f"Received: num_features={num_features}, feature_map={identifier!r}"
        )
    feature_map = identifier
    if isinstance(identifier, FeatureMap):
        identifier = keras.saving.serialize_keras_object(identifier)
    if isinstance(identifier, dict):
        # Without the shapes of an earlier build, for which it would be built at once.
        config = {k: v for k, v in identifier.items() if k != "build_config"}
        feature_map = keras.saving.deserialize_keras_object(config)
    if not isinstance(feature_map, FeatureMap):
        raise ValueError(
            f"feature_map must be one of {sorted(_NAMES)} or a FeatureMap such as "
            f"GeneralizedKernel(fn). Received: feature_map={identifier!r}"
        )
    return feature_map
