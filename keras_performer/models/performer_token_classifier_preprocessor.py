"""Strings and a label for each token to inputs of the token classifier."""

from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.layers._arguments import packed_length
from keras_performer.models._load_preset import load_by_name
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.protein_tokenizer import ProteinTokenizer


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerTokenClassifierPreprocessor(keras_hub.models.Preprocessor):
    """Tokenize strings, and lay the label of each token beside it.

    It runs on Python strings, before a `tf.data` pipeline rather than in one.

    **Shapes** B strings give `token_ids` and `padding_mask` (B, T), and with labels y (B, T) and a
    sample weight (B, T).

    **Args**
        tokenizer: A tokenizer with start, end and padding tokens.
        sequence_length: Length T. What is longer is cut at its end, with its labels.
        ignored_label: A label that does not count, for tokens without a known one.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) x, or `(x, y, sample_weight)` with labels. The sample weight is
    1 at labelled tokens, or the one given for the sequence (B,) or for each token; it is 0 at the
    start and the end token, at padding and at ignored labels, where y is 0. Rows of labels may be
    padded with the ignored label, and rows of weights with anything.

    **Raises** ValueError if a sequence has not one label for each token, for labels below 0 that
    are not the ignored one, and inside TensorFlow's graphs; TypeError for a dict, such as inputs
    that are prepared, and for a tuple of segments.

    **Example**

    >>> preprocessor = PerformerTokenClassifierPreprocessor(ProteinTokenizer(), 6)
    >>> x, y, sample_weight = preprocessor(["MKT", "A"], [[2, 0, 1], [2]])
    >>> y.tolist(), sample_weight[1].tolist()
    ([[0, 2, 0, 1, 0, 0], [0, 2, 0, 0, 0, 0]], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0])

    **Source** The packing of Devlin et al. 2019, arXiv 1810.04805.
    """

    backbone_cls = PerformerEncoderBackbone
    tokenizer_cls = ProteinTokenizer

    def __init__(
        self, tokenizer: Any, sequence_length: int = 512, ignored_label: int = -1, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        self.sequence_length = packed_length(sequence_length)
        self.ignored_label = ignored_label

    def call(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Tokenize and pack strings and labels."""
        if isinstance(x, dict | tuple):
            raise TypeError(
                "PerformerTokenClassifierPreprocessor takes a string or a list of strings, one a "
                "sequence. Set the task's `preprocessor` to None where inputs come prepared. "
                f"Received: x of type {type(x).__name__}"
            )
        if self._use_tf_workflow():
            # keras-hub tries here again what has failed on Python strings, and hides that error.
            raise ValueError(
                "PerformerTokenClassifierPreprocessor takes Python strings, with one label for "
                "each token, and does not run inside TensorFlow's graphs. In `fit` and `evaluate` "
                "check that every sequence has as many labels as the tokenizer makes tokens of "
                "it. For `tf.data`, prepare the samples before. Received: x of type "
                f"{type(x).__name__}"
            )
        single = isinstance(x, str | bytes)
        texts = [x] if single else list(x)
        rows = [np.asarray(ids, "int32") for ids in self.tokenizer(texts)]
        room, shape = self.sequence_length - 2, (len(rows), self.sequence_length)
        token_ids = np.full(shape, self.tokenizer.pad_token_id, "int32")
        padding_mask = np.zeros(shape, "int32")
        for i, row in enumerate(rows):
            count = min(len(row), room)
            token_ids[i, : count + 2] = [
                self.tokenizer.start_token_id,
                *row[:count],
                self.tokenizer.end_token_id,
            ]
            padding_mask[i, : count + 2] = 1
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        if y is None:
            return {name: array[0] for name, array in inputs.items()} if single else inputs

        labels, weights = np.zeros(shape, "int32"), np.zeros(shape, "float32")
        given = [y] if single else list(y)
        if sample_weight is None:
            sample_weight = np.ones(len(rows), "float32")
        sample_weight = [sample_weight] if single else list(sample_weight)
        if not len(rows) == len(given) == len(sample_weight):
            raise ValueError(
                "Every sequence needs a row of labels, and a weight or a row of them if there are "
                f"any. Received: {len(rows)} sequences, {len(given)} rows of labels, "
                f"{len(sample_weight)} weights"
            )
        for i, row in enumerate(rows):
            label = np.asarray(given[i])
            if np.all(label[len(row) :] == self.ignored_label):  # what rows are padded with
                label = label[: len(row)]
            if label.shape != row.shape:
                raise ValueError(
                    "Every token needs one label. Received: "
                    f"{len(label)} labels for the {len(row)} tokens of {texts[i][:60]!r}"
                )
            known = label != self.ignored_label
            if np.any(label[known] < 0) or np.any(label != np.floor(label)):
                raise ValueError(
                    "Labels are integers from 0 on, and the ignored_label "
                    f"{self.ignored_label} at tokens without one. Received: {label[known].min()} "
                    f"to {label[known].max()} for {texts[i][:60]!r}"
                )
            weight = np.asarray(sample_weight[i], "float32")
            weight = np.broadcast_to(weight[: len(row)] if weight.ndim else weight, row.shape)
            count = min(len(row), room)
            known = known[:count]
            labels[i, 1 : count + 1] = np.where(known, label[:count], 0)
            weights[i, 1 : count + 1] = np.where(known, weight[:count], 0.0)
        if single:
            inputs = {name: array[0] for name, array in inputs.items()}
            labels, weights = labels[0], weights[0]
        return inputs, labels, weights

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "sequence_length": self.sequence_length,
            "ignored_label": self.ignored_label,
        }
