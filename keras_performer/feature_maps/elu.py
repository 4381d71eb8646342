"""The elu + 1 kernel of the linear Transformer."""

from typing import Any

import keras
from keras import ops

from keras_performer.feature_maps.feature_map import FeatureMap, without_projection


@keras.saving.register_keras_serializable(package="keras_performer")
class ELU(FeatureMap):
    """Features elu(x) + 1, one for each of the H dimensions: no projection, nothing random.

    **Shapes** (..., H) -> (..., H). **Cost** nothing but the exponential. **Precision** Strictly
    positive; float32 sums.

    **Example**

    >>> float(ELU()(np.array([[0.0, 2.0]], "float32"))[0, 1])
    3.0

    **Source** Katharopoulos et al. 2020, arXiv 2006.16236, equation 7.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(None, projection=None, seed=None, **kwargs)

    def features(
        self, x: Any, operands: tuple[Any, ...], *, is_query: bool
    ) -> tuple[Any, Any | None]:
        """Plain features, the same for queries and keys; see `FeatureMap.features`."""
        # elu(x) + 1 cancels to zero where exp(x) is below the rounding of one; this does not.
        return ops.where(x > 0, x + 1.0, ops.exp(ops.minimum(x, 0.0))), None

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return without_projection(super().get_config())
