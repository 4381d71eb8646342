"""The classifier of whole sequences."""

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.layers._arguments import check_known, dropout_rate, optional_int, positive_int
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._masked_pooling import MaskedPooling
from keras_performer.models._performer_task import (
    check_parts,
    class_for,
    compile_as_saved,
    keep_quantized_head,
    rows,
    take_loaders,
)
from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.performer_sequence_classifier_preprocessor import (
    PerformerSequenceClassifierPreprocessor,
)

# What a problem's output activation may be; without one the outputs are logits.
_ACTIVATIONS = {"single_label": "softmax", "multi_label": "sigmoid", "regression": "linear"}


@load_by_name
@keep_quantized_head
@take_loaders
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerSequenceClassifier(keras_hub.models.TextClassifier):
    """A Performer that predicts the class of a sequence, several labels, or numbers.

    Token states are pooled into one vector, which a dense layer turns into `num_classes` outputs.
    With a `preprocessor`, `fit`, `evaluate`, `predict` and `embed` take raw strings. `fit` takes
    lists, NumPy arrays, `tf.data`, grain, a `keras.utils.PyDataset` and a PyTorch `DataLoader` of
    known length.

    **Shapes** Inputs: a dict of `token_ids` and `padding_mask`, both integers (B, T). Output:
    (B, num_classes).

    **Args**
        backbone: A `PerformerEncoderBackbone` or a `PerformerDecoderBackbone`.
        num_classes: Number of outputs: classes, labels, or numbers to predict.
        preprocessor: A `PerformerSequenceClassifierPreprocessor`, or None if inputs come prepared.
        problem: "single_label" (y is a class (B,)), "multi_label" (y is 0 or 1 (B, num_classes)) or
            "regression" (y is (B, num_classes), or (B,) if there is one). It chooses the default
            loss and metric.
        pooling: "mean" of the tokens that take part, or the "first" or "last" of them. A decoder's
            last token is the one that has seen all others.
        activation: None for logits, "softmax" for single labels, "sigmoid" for several.
        dropout: Rate of dropout before each dense layer of the head.
        hidden_dim: Width of a tanh layer before the last, or None for no such layer.
        **kwargs: `name` of the model, and `compile=False` to leave it uncompiled.

    **Returns** (calling the model) logits, or what `activation` makes of them.

    **Masking** As in the backbone; padding changes no output.

    **Precision** Pooling, head and logits are float32.

    **Cost** The backbone's, and O(T D).

    **Raises** TypeError for another backbone; ValueError for sizes that are not positive integers,
    a rate outside [0, 1), an unknown `problem` or `pooling`, an activation that does not fit, or a
    backbone that has fewer tokens than the tokenizer.

    **Example**

    >>> backbone = PerformerEncoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> preprocessor = PerformerSequenceClassifierPreprocessor(
    ...     ProteinTokenizer(), sequence_length=9
    ... )
    >>> model = PerformerSequenceClassifier(backbone, num_classes=3, preprocessor=preprocessor)
    >>> model.embed(["MKT", "AY"]).shape
    (2, 8)

    **Source** Devlin et al. 2019, arXiv 1810.04805, for fine-tuning a pretrained body with a head;
    there the first token is pooled.
    """

    backbone_cls = PerformerEncoderBackbone
    preprocessor_cls = PerformerSequenceClassifierPreprocessor

    def __new__(cls, backbone: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Make an instance of the class for this kind of backbone."""
        return super().__new__(class_for(cls, backbone), *args, **kwargs)

    def __init__(
        self,
        backbone: PerformerEncoderBackbone | PerformerDecoderBackbone,
        num_classes: int,
        preprocessor: PerformerSequenceClassifierPreprocessor | None = None,
        problem: str = "single_label",
        pooling: str = "mean",
        activation: Any = None,
        dropout: float = 0.0,
        hidden_dim: int | None = None,
        **kwargs: Any,
    ):
        check_known(self, kwargs, "name", "trainable", "compile")
        check_parts(
            "PerformerSequenceClassifier",
            backbone,
            preprocessor,
            PerformerEncoderBackbone,
            PerformerDecoderBackbone,
        )
        num_classes = positive_int("num_classes", num_classes)
        hidden_dim = optional_int("hidden_dim", hidden_dim)
        dropout_rate("dropout", dropout)
        if problem not in _ACTIVATIONS:
            raise ValueError(
                f"`problem` must be one of {tuple(_ACTIVATIONS)}. Received: problem={problem!r}"
            )
        activation = keras.activations.get(activation)
        linear, fitting = keras.activations.linear, keras.activations.get(_ACTIVATIONS[problem])
        if activation not in (linear, fitting):
            raise ValueError(
                f"The activation for problem={problem!r} is None, or {_ACTIVATIONS[problem]!r}. "
                f"Received: activation={keras.activations.serialize(activation)!r}"
            )

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        dtype = "float32"  # so that logits are not rounded
        self.pooling_layer = MaskedPooling(pooling, dtype=dtype, name="pooling")
        self.pooled_dropout = keras.layers.Dropout(dropout, dtype=dtype, name="pooled_dropout")
        self.pooled_dense = None
        if hidden_dim is not None:
            self.pooled_dense = keras.layers.Dense(
                hidden_dim, activation="tanh", dtype=dtype, name="pooled_dense"
            )
            self.output_dropout = keras.layers.Dropout(dropout, dtype=dtype, name="output_dropout")
        self.output_dense = keras.layers.Dense(
            num_classes,
            activation=activation,
            kernel_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            dtype=dtype,
            name="logits",
        )

        # === Functional model ===
        inputs = backbone.input
        x = self.pooled_dropout(self.pooling_layer(backbone(inputs), inputs["padding_mask"]))
        if self.pooled_dense is not None:
            x = self.output_dropout(self.pooled_dense(x))
        # `compile`, at the end of the constructor, reads these.
        self.problem = problem
        self.activation = activation
        super().__init__(inputs=inputs, outputs=self.output_dense(x), **kwargs)

        # === Config ===
        self.num_classes = num_classes
        self.pooling = pooling
        self.dropout = dropout
        self.hidden_dim = hidden_dim
        self._embedders: Callable[..., Any] = _embedders()

    def compile(
        self, optimizer: Any = "auto", loss: Any = "auto", *, metrics: Any = "auto", **kwargs: Any
    ) -> None:
        """Configure training, with defaults that fit `problem`.

        **Args**
            optimizer: Default: Adam with a learning rate of 5e-5.
            loss: Default: sparse categorical cross-entropy, binary cross-entropy or mean squared
                error.
            metrics: Default: sparse categorical accuracy, binary accuracy or mean absolute error.
            **kwargs: As `keras.Model.compile`.
        """
        is_logits = self.activation is keras.activations.linear
        if isinstance(loss, str) and loss == "auto":
            if self.problem == "single_label":
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=is_logits)
            elif self.problem == "multi_label":
                loss = keras.losses.BinaryCrossentropy(from_logits=is_logits)
            else:
                loss = keras.losses.MeanSquaredError()
        if isinstance(metrics, str) and metrics == "auto":
            if self.problem == "single_label":
                metrics = [keras.metrics.SparseCategoricalAccuracy()]
            elif self.problem == "multi_label":
                metrics = [keras.metrics.BinaryAccuracy(threshold=0.0 if is_logits else 0.5)]
            else:
                metrics = [keras.metrics.MeanAbsoluteError()]
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    compile_from_config = compile_as_saved

    def embed(self, x: Any, per_token: bool = False, batch_size: int = 32) -> Any:
        """Vectors of sequences or of their tokens, as NumPy arrays of float32.

        **Args**
            x: A list or array of strings (or a tuple of such segments) if there is a preprocessor;
                or prepared inputs, a dict of `token_ids` and `padding_mask` (B, T).
            per_token: Whether to return the backbone's token states, not the pooled ones.
            batch_size: Number of sequences that go through the backbone at once.

        **Returns** An array (B, D). With `per_token`, a list of B arrays (T_b, D) without padding;
        the start and the end token are there, so without them a string's own tokens are rows
        `[1:-1]`.

        **Raises** ValueError for a single string, and for strings without a preprocessor.
        """
        if isinstance(x, str | bytes):
            raise ValueError(f"`embed` takes a list of strings. Received: x={x!r}")
        preprocess = None if isinstance(x, dict) else self.preprocessor
        if preprocess is None and not isinstance(x, dict):
            raise ValueError(
                "Without a preprocessor `embed` takes a dict of `token_ids` and `padding_mask`. "
                f"Received: x of type {type(x).__name__}"
            )
        positive_int("batch_size", batch_size)
        predict = self._embedders(self, per_token)
        count = len(
            next(iter(x.values())) if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x
        )
        states: list[np.ndarray] = []
        for start in range(0, count, batch_size):
            inputs = rows(x, start, start + batch_size)
            if preprocess is not None:
                inputs = preprocess(x=inputs)
            inputs = {
                name: keras.ops.convert_to_tensor(inputs[name])
                for name in ("token_ids", "padding_mask")
            }
            outputs = np.asarray(predict(inputs), "float32")
            if per_token:
                mask = keras.ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
                states += [row[kept] for row, kept in zip(outputs, mask, strict=True)]
            else:
                states.append(outputs)
        if per_token:
            return states
        width = self.backbone.hidden_dim
        return np.concatenate(states) if states else np.zeros((0, width), "float32")

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_classes": self.num_classes,
            "problem": self.problem,
            "pooling": self.pooling,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "hidden_dim": self.hidden_dim,
        }


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerDecoderSequenceClassifier(PerformerSequenceClassifier):
    """What `PerformerSequenceClassifier(decoder, ...)` is, so that keras-hub finds it."""

    backbone_cls = PerformerDecoderBackbone


def _embedders() -> Callable[[PerformerSequenceClassifier, bool], Callable[..., Any]]:
    """A function that makes, and keeps, the models that compute embeddings."""
    # Kept out of the attributes: Keras would save them with the task, as layers of it.
    known: dict[bool, tuple[Any, Callable[..., Any]]] = {}

    def predict(task: PerformerSequenceClassifier, per_token: bool) -> Callable[..., Any]:
        # LoRA and quantization change the variables, which a compiled function holds.
        variables = [(variable.path, variable.dtype) for variable in task.variables]
        if per_token not in known or known[per_token][0] != variables:
            output = task.backbone.output if per_token else task.pooling_layer.output
            inputs = task.backbone.input if per_token else task.input
            known[per_token] = (variables, keras.Model(inputs, output).predict_on_batch)
        return known[per_token][1]

    return predict
