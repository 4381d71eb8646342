"""The classifier of tokens."""

from typing import Any

import keras
import keras_hub

from keras_performer.layers._arguments import check_known, dropout_rate, positive_int
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_backbone import PerformerStack
from keras_performer.models._performer_task import (
    check_parts,
    class_for,
    compile_as_saved,
    keep_quantized_head,
    take_loaders,
    token_loss,
)
from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.performer_token_classifier_preprocessor import (
    PerformerTokenClassifierPreprocessor,
)


@load_by_name
@keep_quantized_head
@take_loaders
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerTokenClassifier(keras_hub.models.Task):
    """A Performer that gives every token a class, such as the secondary structure of a residue.

    With a `preprocessor`, `fit`, `evaluate` and `predict` take strings and a list of labels for
    each, one label a token. They take lists, a `keras.utils.PyDataset` and a PyTorch `DataLoader`
    of known length; for `tf.data`, prepare the samples with the preprocessor first.

    **Shapes** Inputs: a dict of `token_ids` and `padding_mask`, both integers (B, T). Output:
    logits (B, T, num_classes), float32.

    **Args**
        backbone: A `PerformerEncoderBackbone` or `PerformerDecoderBackbone`.
        num_classes: Number of classes.
        preprocessor: A `PerformerTokenClassifierPreprocessor`, or None if inputs come prepared.
        dropout: Rate of dropout before the last layer.
        **kwargs: `name` of the model, and `compile=False` to leave it uncompiled.

    **Returns** (calling the model) logits of each token's class; meaningless at padding.

    **Masking** As in the backbone. The sample weights of the preprocessor keep special tokens and
    padding out of the loss and of *weighted* metrics.

    **Precision** As the backbone's dtype policy; the last layer is float32.

    **Cost** The backbone's, and O(T D num_classes).

    **Raises** TypeError for another backbone; ValueError for sizes that are not positive, and for a
    backbone that has fewer tokens than the tokenizer.

    **Example**

    >>> backbone = PerformerEncoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> model = PerformerTokenClassifier(backbone, num_classes=3)
    >>> ids = keras.ops.ones((2, 5), "int32")
    >>> tuple(model({"token_ids": ids, "padding_mask": ids}).shape)
    (2, 5, 3)

    **Source** Devlin et al. 2019, arXiv 1810.04805, for fine-tuning on tokens.
    """

    backbone_cls = PerformerEncoderBackbone
    preprocessor_cls = PerformerTokenClassifierPreprocessor

    def __new__(cls, backbone: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Make an instance of the class for this kind of backbone."""
        return super().__new__(class_for(cls, backbone), *args, **kwargs)

    def __init__(
        self,
        backbone: PerformerStack,
        num_classes: int,
        preprocessor: PerformerTokenClassifierPreprocessor | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        check_known(self, kwargs, "name", "trainable", "compile")
        check_parts(
            "PerformerTokenClassifier",
            backbone,
            preprocessor,
            PerformerEncoderBackbone,
            PerformerDecoderBackbone,
        )
        num_classes = positive_int("num_classes", num_classes)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.output_dropout = keras.layers.Dropout(
            dropout_rate("dropout", dropout), dtype=backbone.dtype_policy, name="output_dropout"
        )
        self.output_dense = keras.layers.Dense(
            num_classes,
            kernel_initializer=backbone.kernel_initializer.clone(),
            dtype="float32",  # so that logits are not rounded
            name="logits",
        )

        # === Functional model ===
        outputs = self.output_dense(self.output_dropout(backbone(backbone.input)))
        super().__init__(inputs=backbone.input, outputs=outputs, **kwargs)

        # === Config ===
        self.num_classes = num_classes
        self.dropout = dropout

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = "auto",
        **kwargs: Any,
    ) -> None:
        """Compile; "auto" is Adam, cross-entropy from logits and accuracy, over labelled tokens."""
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(5e-5)
        if isinstance(loss, str) and loss == "auto":
            loss = token_loss()
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        super().compile(optimizer, loss, weighted_metrics=weighted_metrics, **kwargs)

    compile_from_config = compile_as_saved

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "num_classes": self.num_classes, "dropout": self.dropout}


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerDecoderTokenClassifier(PerformerTokenClassifier):
    """What `PerformerTokenClassifier(decoder, ...)` is, so that keras-hub finds it."""

    backbone_cls = PerformerDecoderBackbone
