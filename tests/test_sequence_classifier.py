"""The classifier of whole sequences: pooling, problems, training, and other dtypes."""

import keras
import numpy as np
import pytest
from gradients import call, compiled
from tolerances import assert_close, relative_rms, to_numpy

from keras_performer.models import (
    ByteTokenizer,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerSequenceClassifier,
    PerformerSequenceClassifierPreprocessor,
    ProteinTokenizer,
)
from keras_performer.models._masked_pooling import MaskedPooling

BACKEND = keras.config.backend()
# Single operators are slow to compile on JAX, whole functions elsewhere.
JIT = BACKEND == "jax"
TEXTS = ["MKTAYIAKQ", "ACDEF", "W", "GGGGS"]
LABELS = [0, 1, 2, 1]
ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def make_backbone(backbone_class=PerformerEncoderBackbone, **options):
    keras.utils.set_random_seed(3)
    return backbone_class(
        **{
            "vocabulary_size": 30,
            "num_layers": 1,
            "num_heads": 2,
            "hidden_dim": 12,
            "intermediate_dim": 17,
            "num_features": 16,
            "seed": 1,
            **options,
        }
    )


def make_task(backbone_class=PerformerEncoderBackbone, num_classes=3, dtype=None, **options):
    preprocessor = PerformerSequenceClassifierPreprocessor(ProteinTokenizer(), sequence_length=9)
    backbone = make_backbone(backbone_class, dtype=dtype)
    return PerformerSequenceClassifier(backbone, num_classes, preprocessor, **options)


def token_inputs(lengths=(5, 7), total=7):
    padding_mask = (np.arange(total) < np.array(lengths)[:, None]).astype("int32")
    token_ids = np.random.default_rng(0).integers(5, 30, size=padding_mask.shape).astype("int32")
    return {"token_ids": token_ids * padding_mask, "padding_mask": padding_mask}


def test_pooling_by_hand():
    hidden = np.random.default_rng(0).normal(size=(4, 5, 3)).astype("float32")
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    hidden[mask == 0] = np.nan
    rows = [hidden[b][mask[b] == 1] for b in range(3)]
    expected = {
        "mean": [row.mean(0) for row in rows],
        "first": [row[0] for row in rows],
        "last": [row[-1] for row in rows],
    }
    for pooling, values in expected.items():
        for kind in ("int32", "bool"):
            pooled = MaskedPooling(pooling)(hidden, mask.astype(kind))
            assert_close(pooled, np.stack([*values, np.zeros(3)]).astype("float32"))


@pytest.mark.parametrize(
    ("backbone_class", "pooling"),
    [
        (PerformerEncoderBackbone, "mean"),
        (PerformerEncoderBackbone, "first"),
        (PerformerDecoderBackbone, "last"),
    ],
)
def test_padding_changes_no_output(backbone_class, pooling):
    task = make_task(backbone_class, pooling=pooling)
    x = token_inputs()
    padded = to_numpy(call(task, x))
    assert padded.shape == (2, 3)
    x["token_ids"][0, 5:] = 7
    assert_close(call(task, x), padded, "layer")
    alone = {name: value[:1, :5] for name, value in x.items()}
    assert_close(to_numpy(call(task, alone)), padded[:1], "layer")


def test_the_last_token_of_a_decoder_has_seen_all_and_the_first_itself_only():
    x = token_inputs()
    other = {**x, "token_ids": x["token_ids"].copy()}
    other["token_ids"][:, 2] = 4
    changes = {}
    for pooling in ("first", "last"):
        task = make_task(PerformerDecoderBackbone, pooling=pooling)
        changes[pooling] = np.abs(to_numpy(call(task, other)) - to_numpy(call(task, x))).max()
    assert changes["first"] < 1e-6 < 1e-4 < changes["last"]


def test_preprocessor_packs_without_segment_ids():
    preprocessor = PerformerSequenceClassifierPreprocessor(ProteinTokenizer(), sequence_length=6)
    x, y, sample_weight = preprocessor(["MK", "ACDEFG"], [0, 1], [0.5, 2.0])
    assert sorted(x) == ["padding_mask", "token_ids"]
    assert to_numpy(x["token_ids"]).tolist() == [[1, 15, 13, 2, 0, 0], [1, 5, 6, 7, 8, 2]]
    assert to_numpy(x["padding_mask"]).tolist() == [[1] * 4 + [0] * 2, [1] * 6]
    assert (list(y), list(sample_weight)) == ([0, 1], [0.5, 2.0])
    one = preprocessor("MK")
    assert to_numpy(one["token_ids"]).tolist() == [1, 15, 13, 2, 0, 0]
    pair = preprocessor(x=(["MK"], ["A"]))
    assert to_numpy(pair["token_ids"]).tolist() == [[1, 15, 13, 2, 5, 2]]
    preprocessor.sequence_length = 4
    assert to_numpy(preprocessor("ACD")["token_ids"]).tolist() == [1, 5, 6, 2]
    with pytest.raises(ValueError, match="sequence_length=2"):
        PerformerSequenceClassifierPreprocessor(ProteinTokenizer(), sequence_length=2)


@pytest.mark.parametrize(
    ("problem", "labels", "loss", "metric", "activation"),
    [
        ("single_label", [0, 1, 2, 1], "SparseCategoricalCrossentropy",
         "sparse_categorical_accuracy", "softmax"),
        ("multi_label", [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], "BinaryCrossentropy",
         "binary_accuracy", "sigmoid"),
        ("regression", [[0.5, 1, 2], [1, 1, 1], [3, 0, 0], [0, 0, 1]], "MeanSquaredError",
         "mean_absolute_error", None),
    ],
)  # fmt: skip
def test_each_problem_has_its_loss_and_metric(problem, labels, loss, metric, activation):
    labels = np.array(labels)
    task = make_task(problem=problem)
    assert type(task.loss).__name__ == loss
    logits = to_numpy(call(task, task.preprocessor(TEXTS)))
    evaluated = task.evaluate(TEXTS, labels, batch_size=4, verbose=0, return_dict=True)
    assert set(evaluated) == {"loss", metric}
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = {
        "single_label": lambda: (
            -log_softmax[np.arange(4), labels].mean(),
            (logits.argmax(-1) == labels).mean(),
        ),
        "multi_label": lambda: (
            (np.log1p(np.exp(logits)) - labels * logits).mean(),
            ((logits > 0) == labels).mean(),
        ),
        "regression": lambda: (((logits - labels) ** 2).mean(), np.abs(logits - labels).mean()),
    }[problem]()
    np.testing.assert_allclose([evaluated["loss"], evaluated[metric]], expected, rtol=1e-4)
    if activation is not None:
        # The same weights with probabilities as outputs have the same loss and metric.
        twin = make_task(problem=problem, activation=activation)
        twin.set_weights(task.get_weights())
        same = twin.evaluate(TEXTS, labels, batch_size=4, verbose=0, return_dict=True)
        np.testing.assert_allclose(list(same.values()), list(evaluated.values()), rtol=1e-4)


@pytest.mark.slow_on_tensorflow
def test_one_number_is_predicted_from_a_vector_of_labels():
    task = make_task(num_classes=1, problem="regression")
    task.optimizer.learning_rate = 1e-2
    y = np.array([9.0, 5.0, 1.0, 5.0], "float32") / 9
    losses = task.fit(TEXTS, y, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow_on_tensorflow
def test_learns_which_letter_there_is_and_every_weight_moves():
    letters = np.random.default_rng(0).choice(3, size=48)
    texts = ["ACD"[i] * (2 + i % 5) for i in letters]
    task = make_task(hidden_dim=7)
    task.compile(keras.optimizers.Adam(1e-2), jit_compile=BACKEND != "torch")
    before = [to_numpy(w) for w in task.trainable_weights]
    task.fit(texts, letters, batch_size=16, epochs=6, verbose=0)
    assert task.evaluate(texts, letters, batch_size=16, verbose=0)[1] > 0.9
    for weight, old in zip(task.trainable_weights, before, strict=True):
        assert np.abs(to_numpy(weight) - old).max() > 0, weight.path


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes=0"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim=0"),
        ({"dropout": 1.0}, ValueError, "dropout=1.0"),
        ({"problem": "ranking"}, ValueError, "problem='ranking'"),
        ({"pooling": "max"}, ValueError, "pooling='max'"),
        ({"activation": "sigmoid"}, ValueError, "activation='sigmoid'"),
        ({"backbone": keras.layers.Dense(1)}, TypeError, "PerformerDecoderBackbone. Received"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        PerformerSequenceClassifier(**{"backbone": make_backbone(), "num_classes": 3, **options})


def test_mixed_precision_has_float32_logits():
    task = make_task(dtype="mixed_bfloat16", hidden_dim=7)
    assert {w.dtype for w in task.trainable_weights} == {"float32"}
    plain = make_task(hidden_dim=7)
    plain.set_weights(task.get_weights())
    x = token_inputs()
    got = call(task, x)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"
    assert 0 < relative_rms(got, call(plain, x)) < 3e-2
    losses = task.fit(TEXTS, LABELS, epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[1] < losses[0]


def test_lora_trains_the_head_and_the_adapters_only():
    task = make_task()
    task.backbone.enable_lora(2)
    task.compile(keras.optimizers.SGD(0.5), jit_compile=JIT)
    before = {w.path: to_numpy(w) for w in task.weights}
    task.fit(TEXTS, LABELS, epochs=2, verbose=0)
    moved = {w.path for w in task.weights if np.any(to_numpy(w) != before[w.path])}
    # Keras keeps the biases beside the adapters trainable.
    adapted = ("lora_kernel_a", "lora_kernel_b", "query/bias", "value/bias", "logits/")
    assert all(any(name in path for name in adapted) for path in moved)
    assert any("lora" in path for path in moved) and any("logits/" in path for path in moved)


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_int8_outputs_are_close():
    task = make_task(hidden_dim=7)
    x = token_inputs()
    before, vectors = to_numpy(call(task, x)), task.embed(TEXTS)
    task.quantize("int8")
    assert any(w.dtype == "int8" for w in task.weights)
    assert 0 < relative_rms(compiled(task)(x), before) < 0.1
    # An embedder compiled before would still have the old kernels.
    assert 0 < relative_rms(task.embed(TEXTS), vectors) < 0.1


@pytest.mark.slow_on_jax
def test_bytes_of_any_language_can_be_classified():
    preprocessor = PerformerSequenceClassifierPreprocessor(ByteTokenizer(), sequence_length=12)
    backbone = make_backbone(vocabulary_size=ByteTokenizer().vocabulary_size())
    task = PerformerSequenceClassifier(backbone, 2, preprocessor)
    assert task.predict(["Größe", "大きさ"], verbose=0).shape == (2, 2)


@pytest.mark.slow_on_tensorflow
def test_strings_are_shuffled_for_each_epoch_unless_not():
    task, seen = make_task(num_classes=24), []
    preprocess = task.preprocess_samples

    def recorded(x, y=None, sample_weight=None):
        assert [ACIDS.index(text[0]) for text in x] == [label % 20 for label in y]
        seen.append(tuple(y))
        return preprocess(x, y, sample_weight)

    task.preprocess_samples = recorded
    labels = list(range(24))
    texts = [ACIDS[label % 20] for label in labels]
    in_order = {tuple(labels[i : i + 8]) for i in (0, 8, 16)}
    options = {"batch_size": 8, "verbose": 0}
    keras.utils.set_random_seed(1)
    task.fit(texts, labels, epochs=2, **options)
    assert set().union(*seen) == set(labels)
    assert not in_order & set(seen)
    assert len(set(seen)) >= 6  # other batches in the second epoch
    seen.clear()
    task.fit(np.array(texts), np.array(labels), epochs=2, shuffle=False, **options)
    assert set(seen) == in_order
    seen.clear()
    task.fit(texts, labels, validation_split=0.25, **options)
    assert tuple(labels[18:]) in seen  # validated with as they are
    assert sorted(set().union(*(s for s in seen if s != tuple(labels[18:])))) == labels[:18]


def test_samples_with_and_without_labels_and_weights():
    task = make_task()
    one_by_one = [task.predict([text], verbose=0)[0] for text in TEXTS]
    for x in (TEXTS, np.array(TEXTS), np.array(TEXTS, dtype=object)):
        assert_close(task.predict(x, batch_size=3, verbose=0), np.stack(one_by_one), "layer")
    weights = np.array([1.0, 0.0, 0.0, 0.0])
    loss = task.evaluate(TEXTS, LABELS, sample_weight=weights, batch_size=4, verbose=0)[0]
    alone = task.evaluate(TEXTS[:1], LABELS[:1], verbose=0)[0]
    np.testing.assert_allclose(loss, alone / 4, rtol=1e-5)
    with pytest.raises(ValueError, match=r"must be as many.*\[3, 4\] rows"):
        task.fit(TEXTS, LABELS[:3], verbose=0)


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_what_is_missing_is_no_peptide(method):
    labels = () if method == "predict" else ([0, 1],)
    with pytest.raises(TypeError, match="takes strings"):
        getattr(make_task(), method)(["MKT", float("nan")], *labels, verbose=0)


def test_arguments_that_nothing_takes_are_refused():
    for make in (make_backbone, make_task):
        with pytest.raises(TypeError, match=r"no argument of this name.*exact_windw=16"):
            make(exact_windw=16)
    with pytest.raises(TypeError, match="num_class=2"):
        PerformerSequenceClassifier.from_preset("performer_localization_small", num_class=2)


def test_classes_that_there_are_not_are_refused_before_a_step():
    """JAX would make some loss of them."""
    texts, message = ["MKT", "A", "W"], r"from 0 to 2\. Received: a label of .*num_classes=3"
    for labels in ([0, 1, 3], np.array([-1, 0, 1]), ["a", "b", "c"]):
        with pytest.raises(ValueError, match=message):
            make_task().fit(texts, labels, batch_size=1, verbose=0)
    with pytest.raises(ValueError, match=message):
        make_task().fit(texts, [0, 1, 2], validation_data=(texts, [0, 1, 3]), verbose=0)
    by_name = make_task(activation="softmax")
    by_name.compile("adam", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match=message):
        by_name.evaluate(texts, [0, 1, 7], verbose=0)
    ignoring = make_task()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1)
    ignoring.compile("adam", loss)
    ignoring.evaluate(texts, [0, 1, -1], verbose=0)
    numbers = make_task(problem="regression")
    numbers.evaluate(texts, [[0.0, 1, 2], [3, 4, 5], [-1, -2, 7]], verbose=0)


def test_a_tokenizer_with_more_tokens_than_the_backbone_is_refused():
    with pytest.raises(ValueError, match=r"ByteTokenizer of \d+ tokens, .*vocabulary_size=30"):
        preprocessor = PerformerSequenceClassifierPreprocessor(ByteTokenizer(), 9)
        PerformerSequenceClassifier(make_backbone(), 3, preprocessor)
