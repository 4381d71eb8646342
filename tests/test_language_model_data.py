"""Where the language models take their strings from, and the weights of sequences."""

import functools

import keras
import numpy as np
import pytest
from marks import slow_on_jax, slow_where_compiled
from tolerances import assert_close, to_numpy

from keras_performer.models import (
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSeq2SeqBackbone,
    PerformerSeq2SeqLM,
    PerformerSeq2SeqLMPreprocessor,
    ProteinTokenizer,
)

BACKEND = keras.config.backend()
TEXTS = ["MKTAYIA", "ACDEF", "W", "GGGGS"]
WEIGHTS = np.array([1.0, 0.0, 2.0, 0.5], "float32")
# Every token is masked, so that nothing is drawn at random.
ALL_MASKED = {"mask_selection_rate": 1.0, "mask_token_rate": 1.0, "random_token_rate": 0.0}


def preprocessors():
    tokenizer = ProteinTokenizer()
    return {
        "causal": PerformerCausalLMPreprocessor(tokenizer, sequence_length=7),
        "masked": PerformerMaskedLMPreprocessor(tokenizer, sequence_length=7, **ALL_MASKED),
        "seq_2_seq": PerformerSeq2SeqLMPreprocessor(
            tokenizer, encoder_sequence_length=5, decoder_sequence_length=7
        ),
    }


def make_task(kind):
    keras.utils.set_random_seed(3)
    task_class, backbone_class = {
        "causal": (PerformerCausalLM, PerformerDecoderBackbone),
        "masked": (PerformerMaskedLM, PerformerEncoderBackbone),
        "seq_2_seq": (PerformerSeq2SeqLM, PerformerSeq2SeqBackbone),
    }[kind]
    backbone = backbone_class(30, 1, 2, 12, 17, num_features=16, seed=1)
    task = task_class(backbone, preprocessors()[kind])
    task.compile(keras.optimizers.SGD(0.5), jit_compile=BACKEND == "jax")
    return task


def strings(kind, part=slice(None)):
    if kind == "seq_2_seq":
        return {"encoder_text": TEXTS[::-1][part], "decoder_text": TEXTS[part]}
    return TEXTS[part]


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def sources(kind):
    """The same two batches, as arguments of `fit`; by "weighted" names with weights."""
    halves = slice(0, 2), slice(2, 4)
    plain = [strings(kind, half) for half in halves]
    weighted = [(x, None, WEIGHTS[half]) for x, half in zip(plain, halves, strict=True)]
    rows = np.array(TEXTS) if kind == "causal" else strings(kind)
    made = {
        "weighted arrays": (rows, {"batch_size": 2, "sample_weight": list(WEIGHTS)}),
        "weighted PyDataset": (Batches(weighted), {}),
    }
    if kind == "causal":
        made["PyDataset"] = Batches(plain), {}
    if BACKEND == "torch":
        loader = pytest.importorskip("torch.utils.data").DataLoader
        rows = TEXTS
        if kind == "seq_2_seq":
            columns = strings(kind)
            rows = [dict(zip(columns, pair)) for pair in zip(*columns.values())]  # noqa: B905
        made["DataLoader"] = loader(rows, batch_size=2), {}
        # It cannot collate None by itself.
        made["weighted DataLoader"] = loader(weighted, batch_size=None), {}
    return made


# The causal one is enough where every model is compiled.
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "kind", ["causal", *slow_on_jax("masked"), *slow_where_compiled("seq_2_seq")]
)
def test_all_sources_train_as_prepared_arrays_do(kind):
    task = make_task(kind)
    start = task.get_weights()
    x, y, plain = task.preprocessor(strings(kind))
    x = {name: to_numpy(array) for name, array in x.items()}
    plain = to_numpy(plain).astype("float32")

    def trained(fit, *data, **options):
        task.set_weights(start)
        history = fit(*data, **options, shuffle=False, verbose=0).history
        return history["loss"], np.concatenate([weight.ravel() for weight in task.get_weights()])

    def expected(weights):
        fit = functools.partial(keras.Model.fit, task)
        return trained(fit, x, to_numpy(y), batch_size=2, sample_weight=weights)

    weighted, unweighted = expected(plain * WEIGHTS[:, None]), expected(plain)
    assert np.abs(weighted[1] - unweighted[1]).max() > 1e-3
    for name, (data, options) in sources(kind).items():
        loss, values = trained(task.fit, data, **options)
        right = weighted if "weighted" in name else unweighted
        np.testing.assert_allclose(loss, right[0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(values, right[1], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eager")
def test_loaders_evaluate_predict_and_validate():
    task = make_task("causal")
    texts, halves = Batches([TEXTS[:2], TEXTS[2:]]), Batches([(TEXTS[:2], None, WEIGHTS[:2])])
    expected = task.predict(TEXTS, batch_size=2, verbose=0)
    assert expected.shape == (4, 7, 30)
    assert_close(task.predict(texts, verbose=0), expected)
    scores = task.evaluate(TEXTS[:2], sample_weight=WEIGHTS[:2], batch_size=2, verbose=0)
    assert scores[0] != pytest.approx(task.evaluate(TEXTS[:2], batch_size=2, verbose=0)[0])
    np.testing.assert_allclose(task.evaluate(halves, verbose=0), scores, rtol=1e-5)
    history = task.fit(halves, validation_data=(TEXTS[:2], None, WEIGHTS[:2]), verbose=0).history
    np.testing.assert_allclose(task.evaluate(halves, verbose=0)[0], history["val_loss"], rtol=1e-5)
    # Weights of validation alone count as well.
    nothing = (TEXTS[:2], None, 0 * WEIGHTS[:2])
    assert task.fit(TEXTS[:2], validation_data=nothing, verbose=0).history["val_loss"] == [0.0]


@pytest.mark.parametrize("kind", ["causal", "masked", "seq_2_seq"])
def test_weights_of_sequences_multiply_those_of_labels(kind):
    preprocessor = preprocessors()[kind]
    _, y, plain = preprocessor(strings(kind))
    _, labels, weights = preprocessor(strings(kind), sample_weight=WEIGHTS)
    np.testing.assert_array_equal(to_numpy(labels), to_numpy(y))
    plain = to_numpy(plain).astype("float32")
    assert plain.sum() > 10
    np.testing.assert_array_equal(to_numpy(weights), plain * WEIGHTS[:, None])
    one = strings(kind)
    one = {name: column[3] for name, column in one.items()} if isinstance(one, dict) else one[3]
    np.testing.assert_array_equal(to_numpy(preprocessor(one, sample_weight=0.5)[2]), plain[3] / 2)
    for wrong in (WEIGHTS[:, None], 0.5):
        with pytest.raises(ValueError, match="one weight for each sequence"):
            preprocessor(strings(kind), sample_weight=wrong)
    with pytest.raises(ValueError, match=r"makes the labels itself.*y of type list"):
        preprocessor(strings(kind), y=[0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["causal", "seq_2_seq"])
def test_tensorflow_graphs_weigh_as_python_does(kind):
    tf = pytest.importorskip("tensorflow")
    preprocessor = preprocessors()[kind]
    rows = tf.data.Dataset.from_tensor_slices((strings(kind), WEIGHTS.astype("float64")))
    expected = preprocessor(strings(kind), sample_weight=WEIGHTS)
    dataset = rows.batch(4).map(lambda x, weight: preprocessor(x, sample_weight=weight))
    outputs = dataset.get_single_element()
    for name, array in expected[0].items():
        np.testing.assert_array_equal(outputs[0][name].numpy(), to_numpy(array), err_msg=name)
    for output, array in zip(outputs[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(output.numpy(), to_numpy(array))


def test_one_weight_a_row_is_needed():
    task = make_task("causal")
    with pytest.raises(ValueError, match=r"must be as many.*\[3, 4\] rows"):
        task.fit(TEXTS, sample_weight=WEIGHTS[:3])
    with pytest.raises(ValueError, match=r"go with `x` as strings or as a loader.*type object"):
        task.fit(object(), validation_data=(TEXTS, None, WEIGHTS))
    with pytest.raises(ValueError, match=r"leave rows to train on.*validation_split=0\.9 of 4"):
        task.fit(np.array(TEXTS), sample_weight=WEIGHTS, validation_split=0.9)
    with pytest.raises(ValueError, match=r"leave out the other arguments\. Received: sample_w"):
        task.fit(Batches([TEXTS]), sample_weight=WEIGHTS)
    with pytest.raises(ValueError, match=r"without labels go with strings.*type _Strings"):
        task.evaluate(_Strings(), sample_weight=WEIGHTS)


class _Strings:
    """Neither a list nor an array."""


@pytest.mark.slow_on_jax
@pytest.mark.usefixtures("eager")
def test_whatever_validates_weights_count():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2)
    task = make_task("causal")
    expected = pytest.approx(task.evaluate(TEXTS, batch_size=2, verbose=0)[0], rel=1e-5)
    options = {"sample_weight": 0 * WEIGHTS, "batch_size": 2, "verbose": 0}
    for validation in (TEXTS, np.array(TEXTS), (TEXTS,), dataset):
        history = task.fit(TEXTS, validation_data=validation, **options).history
        assert history["loss"] == [0.0] and history["val_loss"] == [expected]
