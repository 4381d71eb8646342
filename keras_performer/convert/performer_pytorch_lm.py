"""The language model of performer-pytorch."""

from typing import Any

import keras
import keras_hub

from keras_performer.convert.performer_pytorch_backbone import PerformerPytorchBackbone
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import keep_quantized_head


@load_by_name
@keep_quantized_head
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerPytorchLM(keras_hub.models.Task):
    """`PerformerLM` of performer-pytorch: logits at every token. It is not compiled.

    **Shapes** A dict of `token_ids` and `padding_mask` (B, T) -> (B, T, vocabulary).

    **Args**
        backbone: A `PerformerPytorchBackbone`.
        preprocessor: A keras-hub preprocessor, or None for inputs that are ids.
        tie_weights: Whether logits are products with the token embeddings, without a bias.
        **kwargs: `name` and `trainable` of the model.

    **Example**

    >>> backbone = keras_performer.convert.PerformerPytorchBackbone(
    ...     vocabulary_size=7, max_sequence_length=20, num_layers=1, num_heads=2, hidden_dim=8,
    ...     key_dim=4, intermediate_dim=16,
    ... )
    >>> model = PerformerPytorchLM(backbone)
    >>> ids = np.ones((1, 5), "int32")
    >>> tuple(model({"token_ids": ids, "padding_mask": ids}).shape)
    (1, 5, 7)
    """

    backbone_cls = PerformerPytorchBackbone

    def __init__(
        self,
        backbone: PerformerPytorchBackbone,
        preprocessor: Any = None,
        tie_weights: bool = False,
        **kwargs: Any,
    ):
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.output_dense = None
        if not tie_weights:
            self.output_dense = keras.layers.Dense(
                backbone.vocabulary_size, dtype=backbone.dtype_policy, name="output_dense"
            )

        # === Functional model ===
        hidden = backbone(backbone.input)
        if self.output_dense is None:
            outputs = backbone.token_embedding(hidden, reverse=True)
        else:
            outputs = self.output_dense(hidden)
        # What it is trained for is not known, so there is no default loss.
        super().__init__(inputs=backbone.input, outputs=outputs, **{"compile": False, **kwargs})

        # === Config ===
        self.tie_weights = tie_weights

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "tie_weights": self.tie_weights}
