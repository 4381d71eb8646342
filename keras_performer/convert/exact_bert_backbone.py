"""BERT's encoder, to the rounding of its weights."""

import keras
import keras_hub

from keras_performer.models._load_preset import load_by_name


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class ExactBertBackbone(keras_hub.models.DistilBertBackbone):
    """A BERT encoder whose arithmetic is that of the original.

    keras-hub's `BertBackbone` approximates GELU. Its `DistilBertBackbone` is a BERT encoder with
    exact GELU, without pooler and segments. This is that under a name of its own: keras-hub finds
    the tasks of a preset by the class of its backbone, and those of BERT are not DistilBERT's, see
    `ExactBertMaskedLM`.

    **Args** Those of `keras_hub.models.DistilBertBackbone`.

    **Example**

    >>> backbone = ExactBertBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> ids = np.ones((1, 5), "int32")
    >>> tuple(backbone({"token_ids": ids, "padding_mask": ids}).shape)
    (1, 5, 8)
    """
