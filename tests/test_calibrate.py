"""Attention transfer from a softmax model to what was made of it."""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from marks import slow_where_compiled
from test_performerize import (  # noqa: F401, a fixture
    HUB,
    attention_model,
    backbone_of,
    eagerly,
    inputs_of,
    randomize,
    task_of,
    to_numpy,
    tokens,
)
from tolerances import assert_exact

from keras_performer.convert import calibrate, performerize
from keras_performer.feature_maps import FavorPlus, FavorPlusPlus
from keras_performer.layers import PerformerAttention

LEARNED = FavorPlus(8, trainable_projection=True, seed=1)


def teacher_model():
    """Two layers of attention, the first of whose errors the second would see."""
    x = keras.Input((None, 10))
    mask = keras.Input((None,), dtype="bool")
    hidden = keras_hub.layers.TransformerEncoder(17, 2, dropout=0.2)(x, padding_mask=mask)
    hidden = keras.layers.MultiHeadAttention(3, 5)(hidden, hidden, use_causal_mask=True)
    return randomize(keras.Model([x, mask], keras.layers.Dense(3)(hidden)))


def data(rows=16):
    rng = np.random.default_rng(2)
    mask = np.arange(11) < rng.integers(4, 12, (rows, 1))
    return [rng.normal(size=(rows, 11, 10)).astype("float32"), mask]


def adam(rate=1e-2):
    return keras.optimizers.Adam(rate)


def weights(model):
    return {w.path: to_numpy(w).copy() for w in model.weights if "seed" not in w.path}


def changed(model, before):
    return {path for path, value in weights(model).items() if (value != before[path]).any()}


def attention_errors(student, teacher, x):
    """Relative errors of each layer at the teacher's inputs, by way of NumPy and public calls."""
    inputs = {}
    block, attention = (layer for layer in teacher.layers if layer.name in student_layers(teacher))
    exact = performerize(teacher, feature_map=None)
    x, mask = x
    inputs["block"] = (x, {"key_mask": mask})
    inputs["attention"] = (to_numpy(block(x, padding_mask=mask)), {"use_causal_mask": True})
    errors = []
    for name, kind in ((block.name, "block"), (attention.name, "attention")):
        queries, call = inputs[kind]
        ours, theirs = (
            layer.self_attention_layer if kind == "block" else layer
            for layer in (student.get_layer(name), exact.get_layer(name))
        )
        a, b = (to_numpy(layer(queries, queries, **call)) for layer in (ours, theirs))
        keep = mask if kind == "block" else np.ones_like(mask)
        errors.append(((a - b)[keep] ** 2).sum() / (b[keep] ** 2).sum())
    return errors


def student_layers(teacher):
    kinds = (keras_hub.layers.TransformerEncoder, keras.layers.MultiHeadAttention)
    return [layer.name for layer in teacher.layers if isinstance(layer, kinds)]


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eagerly")
def test_the_loss_is_the_error_at_the_teachers_inputs():
    teacher = teacher_model()
    student = performerize(teacher, num_features=8, seed=1)
    x = data()
    expected = np.mean(attention_errors(student, teacher, x))
    history = calibrate(
        student, teacher, x, train="attention", optimizer=adam(0.0), batch_size=16, verbose=0
    )
    assert expected > 1e-3
    np.testing.assert_allclose(history.history["loss"], [expected], rtol=1e-3)


@pytest.mark.slow_on_tensorflow
@pytest.mark.usefixtures("eagerly")
@pytest.mark.parametrize("train", ["feature_maps", *slow_where_compiled("attention", "all")])
@pytest.mark.slow_on_jax
def test_attention_comes_closer_and_nothing_else_changes(train):
    keras.utils.set_random_seed(1)  # of the order of batches
    teacher = teacher_model()
    student = performerize(teacher, feature_map=LEARNED)
    student.compile(keras.optimizers.SGD(name="own"), "mse")
    trainable = [v.trainable for v in student.variables]
    original, before, x = weights(teacher), weights(student), data()
    errors = attention_errors(student, teacher, x)
    seen = []
    history = calibrate(
        student,
        teacher,
        x,
        train=train,
        optimizer=adam(),
        epochs=6,
        batch_size=4,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(1))],
        validation_data=(x,),
        validation_batch_size=16,
    )
    assert isinstance(history, keras.callbacks.History)
    assert len(seen) == 6
    assert history.history["val_loss"][-1] < 0.92 * history.history["val_loss"][0]
    if train != "all":
        after = attention_errors(student, teacher, x)
        assert all(a < b for a, b in zip(after, errors, strict=True))
    moved = changed(student, before)
    assert any("feature_map/" in path for path in moved)
    if train == "feature_maps":
        assert all("feature_map/" in path for path in moved)
        assert len(moved) == 2
    elif train == "attention":
        inside = {w.path for x in attentions(student) for w in x.weights}
        assert moved <= inside
        assert any("attention_output" in path for path in moved)
    else:
        assert any("feedforward" in path for path in moved)
    assert not changed(teacher, original)
    assert [v.trainable for v in student.variables] == trainable
    assert student.optimizer.name == "own"


def attentions(model):
    return [x for x in model._flatten_layers() if isinstance(x, PerformerAttention)]


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eagerly")
def test_steps_do_not_depend_on_gradients_of_earlier_ones():
    teacher = backbone_of(HUB.BertBackbone)
    x = inputs_of(teacher)[0]

    def run(student, epochs):
        sgd = keras.optimizers.SGD(0.03)
        calibrate(student, teacher, x, train="attention", optimizer=sgd, epochs=epochs, verbose=0)

    together, first, second = (performerize(teacher, feature_map=LEARNED) for _ in range(3))
    run(together, 2)
    run(first, 1)
    second.set_weights(first.get_weights())
    run(second, 1)
    assert changed(second, weights(first))
    for a, b in zip(together.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eagerly")
def test_a_calibrated_task_learns_from_strings_and_is_saved_as_before(tmp_path):
    teacher = task_of("GPT2CausalLM")
    student = performerize(teacher, feature_map=LEARNED, exact_window=2)
    history = calibrate(
        student,
        teacher,
        ["a quick fox sleeps", "dog runs", "fox runs", "a dog"],
        optimizer=adam(),
        epochs=3,
        verbose=0,
    )
    assert history.history["loss"][-1] < history.history["loss"][0]
    student.save_to_preset(str(tmp_path))
    loaded = HUB.GPT2CausalLM.from_preset(str(tmp_path))
    assert type(loaded) is type(student)
    x = inputs_of(student)[0]
    assert_exact(loaded(x), student(x))


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_batches_of_strings_are_those_of_a_list():
    teacher = task_of("GPT2CausalLM")
    texts = ["a quick fox sleeps", "dog runs", "fox runs", "a dog"]
    losses = []
    encoded = [text.encode() for text in texts]
    for data in (texts, encoded, tf.data.Dataset.from_tensor_slices(texts).batch(2)):
        student = performerize(teacher, feature_map=LEARNED, exact_window=2)
        options = {"batch_size": 2, "shuffle": False} if isinstance(data, list) else {}
        options |= {"validation_data": (texts,), "validation_batch_size": 2}
        history = calibrate(student, teacher, data, epochs=2, verbose=0, **options).history
        losses.append([*history["loss"], *history["val_loss"]])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-4)


def test_statistics_of_feature_maps_are_gathered():
    teacher = attention_model(keras.layers.MultiHeadAttention(2, 5))
    student = performerize(teacher, feature_map=FavorPlusPlus(8, seed=1))
    (layer,) = attentions(student)
    calibrate(student, teacher, [*tokens()], batch_size=1, verbose=0)
    assert int(layer.feature_map.num_updates) == 2
    # Those of the queries that attention had, masked keys left out.
    x, _ = tokens()
    projected = to_numpy(layer.query_dense(x)) * 5**-0.25
    moments = [(row**2).mean(axis=(0, 1)) for row in projected]
    lowest, highest = np.min(moments, axis=0) - 1e-5, np.max(moments, axis=0) + 1e-5
    gathered = to_numpy(layer.feature_map.query_square)
    assert gathered.shape == (2, 5)
    assert (gathered.mean(0) >= lowest).all()
    assert (gathered.mean(0) <= highest).all()


def test_what_does_not_fit_is_refused():
    teacher = teacher_model()
    student = performerize(teacher, num_features=8)
    x = data()
    with pytest.raises(ValueError, match="trainable_projection=True"):
        calibrate(student, teacher, x)
    with pytest.raises(ValueError, match="train='some'"):
        calibrate(student, teacher, x, train="some")
    other = attention_model(keras.layers.MultiHeadAttention(3, 5))
    with pytest.raises(ValueError, match="same attention layers"):
        calibrate(student, other, x, train="attention")
    with pytest.raises(ValueError, match="with a preprocessor"):
        calibrate(student, teacher, ["text"], train="attention")
    student.trainable = False
    with pytest.raises(ValueError, match="frozen where it should learn"):
        calibrate(student, teacher, x, train="attention")


@pytest.mark.usefixtures("eagerly")
def test_windows_that_cover_the_inputs_are_refused():
    teacher = attention_model(keras.layers.MultiHeadAttention(2, 5))
    x = [*tokens()]  # of length 11
    student = performerize(teacher, feature_map=LEARNED, exact_window=6)
    before = weights(student)
    with pytest.raises(ValueError, match=r"cover the inputs.*\(11, 6\)"):
        calibrate(student, teacher, x, verbose=0)
    assert not changed(student, before)
    assert all(v.trainable for v in student.trainable_variables)


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eagerly")
def test_windows_that_leave_one_key_to_the_features_are_calibrated():
    teacher = attention_model(keras.layers.MultiHeadAttention(2, 5))
    x = [*tokens()]  # of length 11, and two blocks have 10
    student = performerize(teacher, feature_map=LEARNED, exact_window=5)
    before = weights(student)
    calibrate(student, teacher, x, optimizer=adam(), verbose=0)
    assert len(changed(student, before)) == 1
