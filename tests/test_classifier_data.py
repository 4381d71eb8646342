"""Where the sequence classifier takes its samples from, and the embeddings that it gives."""

import keras
import numpy as np
import pytest
from gradients import call
from test_sequence_classifier import BACKEND, JIT, LABELS, TEXTS, make_task
from tolerances import assert_close, to_numpy


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, **options):
        super().__init__(**options)
        self.arrays = arrays
        self.epochs = 0

    def __len__(self):
        return 2

    def __getitem__(self, index):
        part = slice(2 * index, 2 * index + 2)
        batch = tuple(array[part] for array in self.arrays)
        return batch if len(batch) > 1 else batch[0]

    def on_epoch_end(self):
        self.epochs += 1


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_all_data_sources_train_the_same():
    """One step of SGD on all samples; the second class has the weight 0 in half of the rows."""
    weights = np.array([1.0, 0.0, 2.0, 1.0], "float32")
    rows = {"sample_weight": weights, "batch_size": 2, "shuffle": False}
    sources = {
        "lists": lambda: ((TEXTS, LABELS), rows),
        "numpy": lambda: ((np.array(TEXTS), np.array(LABELS)), rows),
        "pydataset": lambda: ((Batches(TEXTS, LABELS, weights),), {"shuffle": False}),
    }
    if BACKEND != "jax":
        tf = pytest.importorskip("tensorflow")
        sources["tf.data"] = lambda: (
            (tf.data.Dataset.from_tensor_slices((TEXTS, LABELS, weights)).batch(2),),
            {},
        )
    if BACKEND == "torch":
        torch_data = pytest.importorskip("torch.utils.data")
        samples = list(zip(TEXTS, LABELS, weights, strict=True))
        sources["DataLoader"] = lambda: ((torch_data.DataLoader(samples, batch_size=2),), {})
    trained = {}
    for name, make in sources.items():
        task = make_task()
        task.compile(keras.optimizers.SGD(0.5), jit_compile=JIT)
        data, options = make()
        history = task.fit(*data, **options, epochs=2, verbose=0).history
        trained[name] = task.get_weights(), history["loss"]
        assert len(history["loss"]) == 2
    for name, (values, losses) in trained.items():
        np.testing.assert_allclose(losses, trained["lists"][1], rtol=1e-5, err_msg=name)
        for value, expected in zip(values, trained["lists"][0], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_loaders_evaluate_predict_validate_and_see_their_epochs():
    task = make_task()
    expected = task.predict(TEXTS, batch_size=2, verbose=0)
    assert_close(task.predict(Batches(TEXTS), verbose=0), expected)
    scores = task.evaluate(TEXTS, LABELS, batch_size=2, verbose=0)
    data = Batches(TEXTS, LABELS)
    np.testing.assert_allclose(task.evaluate(data, verbose=0), scores, rtol=1e-5)
    history = task.fit(data, validation_data=Batches(TEXTS, LABELS), epochs=2, verbose=0).history
    assert len(history["val_loss"]) == 2 and data.epochs >= 2
    arrays = (TEXTS[:2], np.array(LABELS[:2]))
    history = task.fit(data, validation_data=arrays, verbose=0).history
    assert np.isfinite(history["val_loss"]).all()
    with pytest.raises(ValueError, match=r"leave out the other arguments\. Received: y"):
        task.fit(data, LABELS)
    history = task.fit(TEXTS, LABELS, validation_data=data, verbose=0).history
    assert np.isfinite(history["val_loss"]).all()
    expected = task.predict(TEXTS, batch_size=2, verbose=0)
    prepared = {name: to_numpy(x) for name, x in task.preprocessor(TEXTS).items()}
    with pytest.raises(ValueError, match="only if `x` is one too"):
        task.fit(prepared, np.array(LABELS), validation_data=data)
    task.preprocessor = None
    assert_close(task.predict(prepared, batch_size=2, verbose=0), expected)


def test_embeddings_are_the_pooled_states_of_each_text():
    task = make_task()
    pooled = task.embed(TEXTS, batch_size=2)
    states = task.embed(TEXTS, per_token=True, batch_size=2)
    assert pooled.shape == (4, 12) and pooled.dtype == np.float32
    assert [row.shape for row in states] == [(9, 12), (7, 12), (3, 12), (7, 12)]
    assert_close(np.stack([row.mean(0) for row in states]), pooled)
    x = {name: to_numpy(value) for name, value in task.preprocessor(TEXTS).items()}
    assert_close(to_numpy(call(task.backbone, x))[1, :7], states[1], "layer")
    assert_close(task.embed(x), pooled, "layer")
    assert_close(task.embed(np.array(TEXTS)), pooled, "layer")
    assert task.embed([]).shape == (0, 12)
    task.backbone.set_weights([1.5 * w for w in task.backbone.get_weights()])
    assert np.abs(task.embed(TEXTS, batch_size=2) - pooled).max() > 1e-2
    with pytest.raises(ValueError, match=r"takes a list of strings\. Received: x='MK'"):
        task.embed("MK")
    task.preprocessor = None
    with pytest.raises(ValueError, match="Without a preprocessor"):
        task.embed(TEXTS)
