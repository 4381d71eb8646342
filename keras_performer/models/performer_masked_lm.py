"""The masked language model."""

from typing import Any

import keras
import keras_hub

from keras_performer.layers._arguments import check_known
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import (
    check_parts,
    compile_as_saved,
    keep_quantized_head,
    take_loaders,
    token_loss,
)
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.performer_masked_lm_preprocessor import PerformerMaskedLMPreprocessor


@load_by_name
@keep_quantized_head
@take_loaders
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerMaskedLM(keras_hub.models.MaskedLM):
    """A Performer encoder that predicts masked tokens, for pretraining and for scoring tokens.

    The hidden states at `mask_positions` go through a dense layer, a norm, and the transposed token
    embedding, which the head shares. With a `preprocessor`, `fit`, `evaluate` and `predict` take
    raw strings and mask them afresh each time: lists, NumPy arrays, `tf.data`, grain, a
    `keras.utils.PyDataset` and a PyTorch `DataLoader` of known length. A `sample_weight` has one
    weight for each string; in the batches of a loader it comes third, as
    `(strings, None, sample_weight)`.

    **Shapes** Inputs: a dict of `token_ids` (B, T), `padding_mask` (B, T) and `mask_positions`
    (B, P), all integers. Output: logits (B, P, vocabulary_size).

    **Args**
        backbone: A `PerformerEncoderBackbone`.
        preprocessor: A `PerformerMaskedLMPreprocessor`, or None if inputs come prepared.
        **kwargs: `name` of the model, and `compile=False` to leave it uncompiled.

    **Returns** (calling the model) logits at the masked positions.

    **Masking** As in `PerformerEncoderBackbone`. Unused places in `mask_positions` are 0 and carry
    the sample weight 0, so losses and *weighted* metrics do not count them.

    **Precision** As the backbone's dtype policy; the head and the logits in its variable dtype.

    **Cost** The backbone's, and O(P D (D + vocabulary_size)).

    **Raises** TypeError for another backbone; ValueError if it has fewer tokens than the tokenizer.

    **Example**

    >>> backbone = PerformerEncoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> model = PerformerMaskedLM(backbone)
    >>> ids = keras.ops.ones((2, 5), "int32")
    >>> x = {"token_ids": ids, "padding_mask": ids, "mask_positions": ids[:, :3]}
    >>> tuple(model(x).shape)
    (2, 3, 30)

    **Source** Devlin et al. 2019, arXiv 1810.04805, for the objective.
    """

    backbone_cls = PerformerEncoderBackbone
    preprocessor_cls = PerformerMaskedLMPreprocessor

    def __init__(
        self,
        backbone: PerformerEncoderBackbone,
        preprocessor: PerformerMaskedLMPreprocessor | None = None,
        **kwargs: Any,
    ):
        check_known(self, kwargs, "name", "trainable", "compile")
        check_parts("PerformerMaskedLM", backbone, preprocessor, PerformerEncoderBackbone)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.masked_lm_head = keras_hub.layers.MaskedLMHead(
            vocabulary_size=backbone.vocabulary_size,
            token_embedding=backbone.token_embedding,
            intermediate_activation=backbone.activation,
            layer_norm_epsilon=backbone.layer_norm_epsilon,
            kernel_initializer=backbone.kernel_initializer.clone(),
            # Not the policy itself: under a mixed one keras-hub's head adds a float32 bias to
            # logits of half the width, which TensorFlow refuses.
            dtype=backbone.dtype_policy.variable_dtype,
            name="mlm_head",
        )

        # === Functional model ===
        inputs = {
            **backbone.input,
            "mask_positions": keras.Input(shape=(None,), dtype="int32", name="mask_positions"),
        }
        outputs = self.masked_lm_head(backbone(backbone.input), inputs["mask_positions"])
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def compile(self, optimizer: Any = "auto", loss: Any = "auto", **kwargs: Any) -> None:
        """Compile as keras-hub does; the "auto" loss is the mean over the masked tokens."""
        if isinstance(loss, str) and loss == "auto":
            loss = token_loss()
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    compile_from_config = compile_as_saved
