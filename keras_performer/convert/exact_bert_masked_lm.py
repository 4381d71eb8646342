"""BERT's masked language model, to the rounding of its weights."""

from typing import Any

import keras
import keras_hub

from keras_performer.convert.exact_bert_backbone import ExactBertBackbone
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import keep_quantized_head

_EPSILON = 1e-12


@load_by_name
@keep_quantized_head
@keras.saving.register_keras_serializable(package="keras_performer")
class ExactBertMaskedLM(keras_hub.models.DistilBertMaskedLM):
    """A BERT masked language model whose arithmetic is that of the original.

    keras-hub's `BertBackbone` approximates GELU, and its heads normalise with an epsilon of 1e-5 in
    place of 1e-12; together they move the logits of AntiBERTy by 0.03. Here the backbone is an
    `ExactBertBackbone`, and the head is that of `keras_hub.models.DistilBertMaskedLM` with BERT's
    epsilon.

    **Args** Those of `keras_hub.models.DistilBertMaskedLM`; `backbone` is an `ExactBertBackbone`.

    **Example**

    >>> backbone = ExactBertBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> model = ExactBertMaskedLM(backbone)
    >>> ids = np.ones((1, 5), "int32")
    >>> inputs = {"token_ids": ids, "padding_mask": ids, "mask_positions": ids[:, :2]}
    >>> tuple(model(inputs).shape)
    (1, 2, 30)
    """

    backbone_cls = ExactBertBackbone

    def __init__(self, backbone: Any, preprocessor: Any = None, **kwargs: Any):
        super().__init__(backbone, preprocessor, **kwargs)
        # The task has no argument for it; set here, it holds for every copy of the class.
        self.masked_lm_head.layer_norm_epsilon = _EPSILON
        self.masked_lm_head._intermediate_layer_norm.epsilon = _EPSILON
