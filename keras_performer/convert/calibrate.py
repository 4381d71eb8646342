"""Attention transfer: features learn from the attention of the softmax model."""

from typing import Any

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_performer.convert.performerize import performerize
from keras_performer.feature_maps import FeatureMap
from keras_performer.layers import PerformerAttention, attention_layers
from keras_performer.layers._recording import (
    AttentionCall,
    AttentionRecord,
    record_attention,
    record_calls,
)
from keras_performer.models._performer_task import is_tf_dataset

_PARTS = ("feature_maps", "attention", "all")


def calibrate(
    student: keras.Model,
    teacher: keras.Model,
    data: Any,
    *,
    train: str = "feature_maps",
    optimizer: Any = "adam",
    **fit_options: Any,
) -> keras.callbacks.History:
    """Train the attention of a converted model to give the outputs of the original's.

    The loss is the mean squared error between the output of each attention layer and that of the
    teacher's layer, divided by the mean square of the latter: 0 is a perfect copy, 1 as bad as
    zeros. It is averaged over the layers, and leaves out masked queries.

    For "feature_maps" and "attention" each layer of the student is given *the teacher's inputs to
    that layer*, so that the layers are separate regressions on clean inputs. Run on its own inputs,
    a deep layer would first chase the errors of those below, which change at every step. "all" does
    run the student on its own inputs, and trains everything below its last attention output; do it
    last, if at all: training on the task itself, or on the teacher's outputs, does more.

    **Args**
        student: What `performerize` made of `teacher`. It is trained in place, and stays what it
            is: the same class, the same `compile`, the same frozen layers.
        teacher: The original, with the weights that the student was made with. It is not changed.
        data: Inputs as the models take them: arrays, or datasets of batches, whose targets are
            ignored. For keras-hub tasks with a preprocessor also strings, in a list, an array or
            batches of `tf.data`.
        train: "feature_maps" for the maps alone: their `trainable_projection`, learned matrices or
            running statistics. "attention" for the projections of queries, keys, values and outputs
            as well, "all" for everything.
        optimizer: As in `compile`.
        **fit_options: As in `fit`: `epochs`, `batch_size`, `callbacks`, `validation_data`,
            `verbose`, ... Callbacks see the model that holds student and teacher.

    **Returns** What `fit` returns.

    **Cost** The teacher's softmax attention, quadratic in length, and the student's forward and
    backward pass; memory for one more copy of the teacher's weights.

    **Raises** ValueError if the two models do not fit together, if the maps have nothing to train,
    or if exact windows cover the inputs, so that nothing goes through the maps.

    **Example**

    >>> x = keras.Input((None, 8))
    >>> teacher = keras.Model(x, keras.layers.MultiHeadAttention(2, 4)(x, x))
    >>> feature_map = keras_performer.feature_maps.FavorPlus(16, trainable_projection=True)
    >>> student = performerize(teacher, feature_map=feature_map)
    >>> history = calibrate(student, teacher, np.ones((4, 6, 8), "float32"), verbose=0)
    >>> sorted(history.history)
    ['loss']

    **Source** Zhang et al. 2024, arXiv 2402.04347 (Hedgehog), section 4.2, for attention transfer;
    they match attention weights, we match outputs, which costs no (T, S) matrix of ours.
    """
    if train not in _PARTS:
        raise ValueError(f"train must be one of {_PARTS}. Received: train={train!r}")
    # The same layers with exact attention, whose calls can be recorded.
    exact = performerize(teacher, feature_map=None)
    attentions, targets = attention_layers(student), attention_layers(exact)
    if [_sizes(x) for x in attentions] != [_sizes(x) for x in targets]:
        raise ValueError(
            "student must be what performerize made of teacher, with the same attention layers in "
            f"the same order. Received: student with {[_sizes(x) for x in attentions]}, teacher "
            f"with {[_sizes(x) for x in targets]} (names, heads and head sizes)"
        )
    if train == "feature_maps":
        _check_trainable(attentions)
        chosen = [v for x in attentions if x.feature_map for v in x.feature_map.trainable_variables]
    else:
        layers = attentions if train == "attention" else [student]
        chosen = [v for layer in layers for v in layer.trainable_variables]
        if not chosen:
            raise ValueError(
                "The student is frozen where it should learn: set `trainable = True` on its "
                f"attention layers. Received: train={train!r}, student {student.name!r}"
            )
    transfer = _Transfer(
        _core(student),
        _core(exact),
        on_own_inputs=train == "all",
        needs_far_keys=train == "feature_maps" and bool(chosen),
    )
    transfer.compile(optimizer=optimizer)
    data = _prepared(student, data)
    rows = keras.tree.flatten(data)
    if transfer.needs_far_keys and all(hasattr(x, "shape") for x in rows):
        # Before `fit`, in which JAX gives away the values of the variables; datasets fail there.
        with record_attention() as records:
            first = keras.tree.map_structure(lambda x: x[:1], data)
            transfer.student(_inputs_of(transfer.student, first), training=False)
        _check_far_keys(records)
    if fit_options.get("validation_data") is not None:
        validation_data = fit_options["validation_data"]
        in_tuple = isinstance(validation_data, tuple)  # whose targets are ignored
        validation_data = _prepared(student, validation_data[0] if in_tuple else validation_data)
        fit_options["validation_data"] = (validation_data,) if in_tuple else validation_data
    # Of variables, not of layers: a frozen layer hides what is trainable in it.
    others = [v for v in student.trainable_variables if not any(v is c for c in chosen)]
    try:
        for variable in others:
            variable.trainable = False
        return transfer.fit(data, **fit_options)
    finally:
        for variable in others:
            variable.trainable = True


class _Transfer(keras.Model):
    """Student and teacher side by side, with the distance of their attention as the loss."""

    def __init__(self, student: Any, teacher: Any, *, on_own_inputs: bool, needs_far_keys: bool):
        super().__init__(name="attention_transfer")
        teacher.trainable = False
        # In this order: on PyTorch, Keras resets the gradients of the variables that it knows by
        # path, where of two with one path the later counts.
        self.teacher = teacher
        self.student = student
        self.on_own_inputs = on_own_inputs
        self.needs_far_keys = needs_far_keys
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        inputs = _inputs_of(self.student, inputs)
        with record_attention() as seen, record_calls() as targets:
            self.teacher(inputs, training=False)
        # Without dropout, which would be noise in a regression on a teacher without any.
        with record_attention() as records, record_calls() as calls:
            if self.on_own_inputs:
                self.student(inputs, training=False)
            else:
                pairs = (attention_layers(model) for model in (self.teacher, self.student))
                students = {id(theirs): ours for theirs, ours in zip(*pairs, strict=True)}
                for target in targets:
                    students[id(target.layer)](**{**target.arguments, "training": False})
        if self.needs_far_keys:
            _check_far_keys(records)
        if training:
            for record in records:
                feature_map = record.layer.feature_map
                if feature_map is not None:
                    feature_map.update_statistics(record.query, record.key, record.key_mask)
        losses = [
            _distance(_output(call), _output(target), _query_mask(target, record.key_mask))
            for call, target, record in zip(calls, targets, seen, strict=True)
        ]
        loss = ops.mean(ops.stack(losses))
        self.add_loss(loss)
        return loss


def _distance(output: Any, target: Any, mask: Any) -> Any:
    """The mean squared error relative to the mean square of the target."""
    output, target = ops.cast(output, "float32"), ops.cast(target, "float32")
    error, size = ops.square(output - target), ops.square(target)
    if mask is not None:
        mask = ops.cast(ops.expand_dims(mask, -1), "float32")
        error, size = error * mask, size * mask
    return ops.sum(error) / ops.maximum(ops.sum(size), 1e-20)


def _query_mask(call: AttentionCall, key_mask: Any) -> Any:
    """Which queries count, (B, T), or None for all."""
    query, value = call.arguments["query"], call.arguments["value"]
    if call.arguments.get("query_mask") is not None or len(query.shape) > 3:
        return call.arguments.get("query_mask")
    if query is not value or key_mask is None:
        return None
    return ops.any(key_mask, axis=1) if len(key_mask.shape) == 3 else key_mask


def _output(call: AttentionCall) -> Any:
    """The output, without attention scores."""
    return call.output[0] if isinstance(call.output, tuple) else call.output


def _sizes(layer: PerformerAttention) -> tuple[str, int, int]:
    return layer.name, layer.num_heads, layer.key_dim


def _check_trainable(attentions: list[PerformerAttention]) -> None:
    """Raise a ValueError if no feature map has anything that data can change."""
    for layer in attentions:
        feature_map = layer.feature_map
        if feature_map is None:
            continue
        adapts = type(feature_map).update_statistics is not FeatureMap.update_statistics
        if adapts or feature_map.trainable_variables:
            return
    raise ValueError(
        "No feature map of the student has anything to train: convert with "
        "feature_map=FavorPlus(num_features, trainable_projection=True), FavorPlusPlus(...) or "
        "'hedgehog', or pass train='attention'. Received: feature maps "
        f"{sorted({type(layer.feature_map).__name__ for layer in attentions})}"
    )


def _inputs_of(model: Any, inputs: Any) -> Any:
    """What a backbone takes: the inputs of a task include what only its head takes."""
    if isinstance(inputs, dict) and isinstance(model.input, dict):
        return {name: inputs[name] for name in model.input}
    return inputs


def _check_far_keys(records: list[AttentionRecord]) -> None:
    """Raise a ValueError if every key is weighed exactly, so that no gradient reaches a map."""
    for record in records:
        length, window = record.key.shape[1], record.layer.exact_window
        # Two blocks of a window's length see each other, and there is no third.
        if record.layer.feature_map and (not window or length is None or length > 2 * window):
            return
    raise ValueError(
        "The exact windows cover the inputs, so the feature maps see no key and cannot learn: pass "
        "inputs of more than twice the exact_window, convert with a smaller one, or leave the maps "
        "as they are. Received: inputs of length and exact_window "
        f"{sorted({(r.key.shape[1], r.layer.exact_window) for r in records})}"
    )


def _core(model: Any) -> Any:
    """The part of a model that has attention: a head may cost more than all of it."""
    return model.backbone if isinstance(model, keras_hub.models.Task) else model


def _prepared(student: Any, data: Any) -> Any:
    """Data for `fit`, with strings preprocessed as the student does."""
    if is_tf_dataset(data):
        spec = data.element_spec
        inputs = spec[0] if isinstance(spec, tuple) else spec
        if all(x.dtype != "string" for x in keras.tree.flatten(inputs)):
            return data
        _check_preprocessor(student, "`tf.data` of strings")
        return data.map(lambda x, *_: _preprocessed(student, x))
    first = data[0] if isinstance(data, (list, tuple, np.ndarray)) and len(data) else None
    if not isinstance(first, str | bytes):
        return data
    _check_preprocessor(student, f"data beginning with {first!r}")
    texts = [text.decode() if isinstance(text, bytes) else str(text) for text in data]
    return _preprocessed(student, texts)


def _preprocessed(student: Any, strings: Any) -> Any:
    samples = student.preprocess_samples(strings)
    return keras.utils.unpack_x_y_sample_weight(samples)[0]


def _check_preprocessor(student: Any, data: str) -> None:
    if not isinstance(student, keras_hub.models.Task) or student.preprocessor is None:
        raise ValueError(
            "Strings need a student that is a keras-hub task with a preprocessor. Received: a "
            f"student of class {type(student).__name__} and {data}"
        )
