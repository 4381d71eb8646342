"""The classifier of tokens: labels beside their tokens, training, and saving."""

import keras
import numpy as np
import pytest
from gradients import call, compiled
from tolerances import assert_close, assert_exact, relative_rms, to_numpy

from keras_performer.models import (
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerTokenClassifier,
    PerformerTokenClassifierPreprocessor,
    ProteinTokenizer,
)

TEXTS = ["MKTAY", "ACDEFGHIK", "W"]
LABELS = [[0, 1, 2, 0, 1], [2, 2, 1, 1, 0, 0, 1, 2, 0], [1]]


def make_preprocessor(sequence_length=8):
    return PerformerTokenClassifierPreprocessor(ProteinTokenizer(), sequence_length)


def make_task(backbone_class=PerformerEncoderBackbone, dtype=None, **options):
    keras.utils.set_random_seed(3)
    backbone = backbone_class(
        vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=12, intermediate_dim=17,
        num_features=16, seed=1, dtype=dtype,
    )  # fmt: skip
    return PerformerTokenClassifier(backbone, 3, make_preprocessor(), **options)


def as_arrays(samples):
    x, y, sample_weight = samples
    return (
        {name: to_numpy(value) for name, value in x.items()},
        to_numpy(y),
        to_numpy(sample_weight),
    )


def test_labels_lie_beside_their_tokens():
    x, y, sample_weight = as_arrays(make_preprocessor()(TEXTS, LABELS))
    assert x["token_ids"].tolist() == [
        [1, 15, 13, 21, 5, 24, 2, 0],
        [1, 5, 6, 7, 8, 9, 10, 2],
        [1, 23, 2, 0, 0, 0, 0, 0],
    ]
    assert x["padding_mask"].sum(1).tolist() == [7, 8, 3]
    assert y.tolist() == [
        [0, 0, 1, 2, 0, 1, 0, 0],
        [0, 2, 2, 1, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ]
    ordinary = (x["token_ids"] > 4).astype(int)
    assert sample_weight.tolist() == ordinary.tolist()


def test_weights_and_unknown_labels():
    _, y, weight = as_arrays(make_preprocessor(5)(["MKT", "A"], [[2, -1, 1], [1]], [0.5, 3.0]))
    assert y.tolist() == [[0, 2, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert weight.tolist() == [[0, 0.5, 0, 0.5, 0], [0, 3, 0, 0, 0]]
    with pytest.raises(ValueError, match="2 labels for the 3 tokens of 'MKT'"):
        make_preprocessor()(["MKT"], [[1, 2]])


@pytest.mark.parametrize("backbone_class", [PerformerEncoderBackbone, PerformerDecoderBackbone])
def test_padding_changes_no_token_and_does_not_count(backbone_class):
    task = make_task(backbone_class)
    x, y, weight = as_arrays(task.preprocessor(TEXTS, LABELS))
    logits = to_numpy(call(task, x))
    assert logits.shape == (3, 8, 3)
    alone = {name: value[:1, :7] for name, value in x.items()}
    assert_close(call(task, alone), logits[:1, :7], "layer")
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    right = np.take_along_axis(scores, y[..., None], -1)[..., 0]
    task.preprocessor = None
    got = task.evaluate(x, y, sample_weight=weight, batch_size=3, verbose=0, return_dict=True)
    np.testing.assert_allclose(got["loss"], -(right * weight).sum() / weight.sum(), rtol=1e-4)
    hits = (logits.argmax(-1) == y) * weight
    accuracy = got["sparse_categorical_accuracy"]
    np.testing.assert_allclose(accuracy, hits.sum() / weight.sum(), rtol=1e-5)


def test_learns_letters_from_prepared_samples():
    texts = ["ACD" * 2, "DCA" * 2, "CADCAD"] * 4
    labels = [["ACD".index(c) for c in text] for text in texts]
    task = make_task()
    x, y, weight = as_arrays(task.preprocessor(texts, labels))
    task.preprocessor = None
    task.compile(keras.optimizers.Adam(3e-2), jit_compile=keras.config.backend() == "jax")
    task.fit(x, y, sample_weight=weight, batch_size=4, epochs=15, verbose=0)
    assert task.evaluate(x, y, sample_weight=weight, batch_size=4, verbose=0)[1] > 0.95


@pytest.mark.parametrize("backbone_class", [PerformerEncoderBackbone, PerformerDecoderBackbone])
def test_saved_tasks_and_presets_come_back(backbone_class, tmp_path):
    task = make_task(backbone_class, dropout=0.25)
    x, _, _ = as_arrays(task.preprocessor(TEXTS, LABELS))
    expected = to_numpy(call(task, x))
    task.save(tmp_path / "task.keras")
    task.save_to_preset(str(tmp_path / "preset"))
    for again in (
        keras.saving.load_model(tmp_path / "task.keras"),
        PerformerTokenClassifier.from_preset(str(tmp_path / "preset")),
    ):
        assert isinstance(again, PerformerTokenClassifier)
        assert (again.num_classes, again.dropout) == (3, 0.25)
        assert again.preprocessor.sequence_length == 8
        assert_exact(call(again, x), expected)


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_mixed_precision_int8_and_lora():
    task = make_task(dtype="mixed_bfloat16")
    plain = make_task()
    plain.set_weights(task.get_weights())
    x, y, weight = as_arrays(task.preprocessor(TEXTS, LABELS))
    logits = call(task, x)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    expected = to_numpy(call(plain, x))
    assert 0 < relative_rms(logits, expected) < 3e-2
    task.backbone.enable_lora(2)
    task.preprocessor = None
    assert np.isfinite(task.train_on_batch(x, y, weight)).all()
    plain.quantize("int8")
    assert 0 < relative_rms(compiled(plain)(x), expected) < 0.1


def test_pure_bfloat16_has_float32_logits():
    task = make_task(dtype="bfloat16")
    x, _, _ = as_arrays(task.preprocessor(TEXTS, LABELS))
    assert keras.backend.standardize_dtype(call(task, x).dtype) == "float32"


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return TEXTS[index : index + 2], LABELS[index : index + 2]


@pytest.mark.slow_on_tensorflow
def test_strings_with_ragged_labels_are_those_prepared():
    task = make_task()
    samples = as_arrays(task.preprocessor(TEXTS, LABELS))
    preprocessor, task.preprocessor = task.preprocessor, None
    expected = task.evaluate(*samples[:2], sample_weight=samples[2], batch_size=3, verbose=0)
    task.preprocessor = preprocessor
    assert task.predict(TEXTS, batch_size=3, verbose=0).shape == (3, 8, 3)
    got = task.evaluate(TEXTS, LABELS, batch_size=3, verbose=0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    options = {"batch_size": 3, "validation_data": (TEXTS, LABELS), "verbose": 0}
    history = task.fit(TEXTS, LABELS, **options).history
    np.testing.assert_allclose(history["loss"], expected[0], rtol=1e-5)
    assert np.isfinite(task.fit(Batches(), verbose=0).history["loss"]).all()


def test_only_strings_are_labelled():
    preprocessor = make_preprocessor()
    prepared = preprocessor(TEXTS)
    for x, name in ((prepared, "dict"), ((TEXTS, TEXTS), "tuple")):
        with pytest.raises(TypeError, match=f"list of strings.*x of type {name}"):
            preprocessor(x=x, y=None)


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_a_wrong_number_of_labels_is_explained(method):
    with pytest.raises(ValueError, match="3 labels for the 2 tokens of 'AY'"):
        getattr(make_task(), method)(["MKT", "AY"], [[1, 2, 0], [1, 2, 0]], verbose=0)


def test_rows_of_labels_and_weights_may_be_ragged_or_padded():
    task = make_task()
    texts = ["MKTAY", "ACD"]
    ragged = task.evaluate(
        texts, [[0, 1, 2, 0, 1], [2, 1, 0]], sample_weight=[[1, 0, 0, 0, 0], [1, 1, 0]], verbose=0
    )
    padded = task.evaluate(
        texts,
        np.array([[0, 1, 2, 0, 1], [2, 1, 0, -1, -1]]),
        sample_weight=np.array([[1.0, 0, 0, 0, 0], [1, 1, 0, 7, 7]]),
        verbose=0,
    )
    np.testing.assert_allclose(ragged, padded, rtol=1e-6)


def test_rows_of_labels_and_weights_are_as_many_as_sequences():
    for labels, weights in (([[0, 1, 2], [0]], None), ([], None), ([[0, 1, 2]], [1.0, 1.0])):
        with pytest.raises(ValueError, match=r"Received: 1 sequences, \d rows of labels, \d weigh"):
            make_preprocessor()(["MKT"], labels, weights)


@pytest.mark.parametrize("label", [-100, 0.5])
def test_labels_that_are_no_classes_are_refused(label):
    with pytest.raises(ValueError, match=r"integers from 0 on, and the ignored_label -1"):
        make_preprocessor()(["MKT"], [[1, label, 2]])


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_classes_that_there_are_not_are_refused_before_a_step(method):
    """JAX would make some loss of them."""
    task = make_task()
    before = [to_numpy(w) for w in task.weights]
    with pytest.raises(ValueError, match=r"from 0 to 2\. Received: a label of .*3.*num_classes=3"):
        getattr(task, method)(["MK", "AY"], [[1, -1], [3, 0]], batch_size=1, verbose=0)
    assert all(map(np.array_equal, before, map(to_numpy, task.weights)))
