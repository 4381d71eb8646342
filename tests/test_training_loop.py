import io
import json
import shutil
import sys

import keras
import numpy as np
import pytest
from processes import run_code
from rich.console import Console

from keras_performer.feature_maps import FavorPlus
from keras_performer.layers import PerformerAttention
from training.data.batches import Batches
from training.loop import fit
from training.sections import ModelConfig, TrainingConfig

TRAINING = {
    "steps": 12,
    "steps_per_epoch": 2,
    "batch_size": 5,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "beta_2": 0.98,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "precision": "float32",
}
LENGTHS = np.random.default_rng(3).integers(1, 50, 37)


def indices(i, rng):
    return i


def walk(batches, epochs):
    for epoch in range(epochs):
        batches.epoch = epoch
        for index in range(len(batches)):
            yield batches[index]


@pytest.mark.parametrize("bucket_batches", [1, 4])
def test_a_pass_takes_every_example_once_in_an_order_of_its_own(bucket_batches):
    # 37 and 148 = 4 * 37 batches of 5 are whole passes and whole buckets.
    batches = Batches(LENGTHS, indices, 5, 37, seed=11, bucket_batches=bucket_batches)
    passes = np.concatenate(list(walk(batches, 4))).reshape(-1, 20 * 37)
    counts = np.bincount(passes[0], minlength=37)
    assert (counts == 20).all()
    if bucket_batches == 1:
        single = passes.reshape(-1, 37)
        assert all(sorted(order) == list(range(37)) for order in single.tolist())
        assert len({tuple(order) for order in single.tolist()}) == len(single)


def test_a_batch_depends_on_seed_and_step_only():
    def noise(i, rng):
        return i, rng.random()

    def batch(seed, steps_per_epoch, epoch, index):
        batches = Batches(LENGTHS, noise, 5, steps_per_epoch, seed, bucket_batches=3)
        batches.epoch = epoch
        return batches[index]

    i, value = batch(1, 4, 2, 3)
    same, same_value = batch(1, 11, 1, 0)
    np.testing.assert_array_equal(i, same)
    assert value == same_value
    other, other_value = batch(2, 4, 2, 3)
    assert (i != other).any() and value != other_value


def test_buckets_hold_examples_of_like_length_and_the_longest_batch_comes_first():
    batches = Batches(LENGTHS, indices, 4, 9, seed=0, bucket_batches=9)
    rows = [LENGTHS[i] for i in walk(batches, 2)]
    spread = [np.ptp(row) for row in rows]
    plain = [np.ptp(LENGTHS[i]) for i in walk(Batches(LENGTHS, indices, 4, 9, seed=0), 2)]
    assert np.mean(spread) < 0.4 * np.mean(plain)
    assert rows[0].max() == max(row.max() for row in rows[:9])
    assert rows[1].min() == min(row.min() for row in rows[:9])
    assert [row.mean() for row in rows[9:]] != sorted(row.mean() for row in rows[9:])


def model(dropout=0.1):
    keras.utils.set_random_seed(5)
    inputs = keras.Input((3,))
    # Without a seed of its own, as in keras-hub's layers.
    hidden = keras.layers.Dropout(dropout)(keras.layers.Dense(4, "tanh")(inputs))
    return keras.Model(inputs, keras.layers.Dense(1)(hidden))


def run(output, validation=None, trainer=None, **changes):
    output.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(37, 3)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    training = TrainingConfig(**{**TRAINING, **changes})
    batches = Batches(np.ones(37), lambda i, _: (x[i], y[i]), 5, training.steps_per_epoch, 0)
    trainer = trainer or model()
    record = fit(
        trainer,
        batches,
        (x, y) if validation is None else validation,
        training,
        loss="mse",
        weighted_metrics=[],
        seed=0,
        output=output,
        console=Console(file=io.StringIO()),
    )
    return trainer, record


def test_a_run_keeps_its_figures_and_says_what_it_spent(tmp_path):
    _, record = run(tmp_path)
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == record["history"]
    assert [row["epoch"] for row in record["history"]] == list(range(6))
    assert record["history"][-1]["val_loss"] < record["history"][0]["val_loss"]
    assert 0 < record["input_seconds"] < record["fit_seconds"]
    assert not record["stopped_early"]
    assert (tmp_path / "backup" / "latest.weights.h5").is_file()


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_patience_ends_the_training_and_keeps_the_best_weights(tmp_path):
    # Validation targets that the training leaves behind: its loss has a minimum early on.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(37, 3)).astype("float32")
    validation = (x, np.zeros((37, 1), "float32"))
    whole = run(tmp_path / "whole", validation, steps=80, learning_rate=5e-2)[1]["history"]
    losses = [row["val_loss"] for row in whole]
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 4, losses

    changes = {"steps": 80, "learning_rate": 5e-2, "patience": 3}
    trainer, record = run(tmp_path / "patient", validation, **changes)
    assert record["stopped_early"]
    assert len(record["history"]) < len(losses)
    assert trainer.evaluate(*validation, verbose=0) == pytest.approx(
        min(row["val_loss"] for row in record["history"]), rel=1e-5
    )

    # Killed between two epochs, it counts on where it was.
    killed = model()
    stop = keras.callbacks.LambdaCallback
    fit_model = killed.fit

    def fit_until_killed(*args, callbacks, **kwargs):
        def die(epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("killed")

        fit_model(*args, callbacks=[*callbacks, stop(on_epoch_end=die)], **kwargs)

    killed.fit = fit_until_killed
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", validation, trainer=killed, **changes)
    _, resumed = run(tmp_path / "killed", validation, **changes)
    assert [row["epoch"] for row in resumed["history"]] == list(range(len(record["history"])))
    for a, b in zip(resumed["history"], record["history"], strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)

    # A run that patience has ended does not train when it is called again.
    trainer, again = run(tmp_path / "patient", validation, **changes)
    assert again["history"] == record["history"]


def test_a_run_whose_figures_are_lost_says_so(tmp_path):
    changes = {"steps": 4, "steps_per_epoch": 2}
    run(tmp_path, **changes)
    history = tmp_path / "history.jsonl"
    history.write_text(history.read_text(encoding="utf-8").splitlines()[0] + "\n", "utf-8")
    with pytest.raises(ValueError, match=r"has 1 lines for the 2 epochs of the backup"):
        run(tmp_path, **changes)
    history.unlink()
    with pytest.raises(ValueError, match=r"has 0 lines for the 2 epochs of the backup"):
        run(tmp_path, **changes)


def test_accumulated_steps_move_the_weights_as_one_large_batch_does(tmp_path):
    changes = {"steps": 4, "steps_per_epoch": 4, "accumulate": 4, "warmup_steps": 0}
    small, _ = run(tmp_path / "small", trainer=model(dropout=0.0), **changes)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(37, 3)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    batches = Batches(np.ones(37), indices, 20, 1, seed=0)
    large = model(dropout=0.0)
    # The weights move in the fourth of four steps of the cosine.
    rate = 1e-2 * (0.95 * 0.5 * (1 + np.cos(np.pi * 3 / 4)) + 0.05)
    optimizer = keras.optimizers.AdamW(rate, beta_2=0.98, weight_decay=0.0, global_clipnorm=1.0)
    large.compile(optimizer, "mse")
    large.train_on_batch(x[batches[0]], y[batches[0]])
    for a, b in zip(small.get_weights(), large.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def attention_model(exact):
    inputs = keras.Input((3,))
    x = keras.layers.Reshape((3, 1))(inputs)
    feature_map = None if exact else FavorPlus(num_features=8)
    x = PerformerAttention(num_heads=1, key_dim=2, feature_map=feature_map, seed=1)(x, x)
    return keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(x)))


@pytest.mark.parametrize("exact", [False, True])
def test_features_are_measured_and_redrawn_where_there_are_any(exact, tmp_path):
    options = {"attention_health": True, "redraw_features_every": 2, "steps": 4}
    _, record = run(tmp_path, trainer=attention_model(exact), **options)
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    for row in [*record["history"], *map(json.loads, lines)]:
        assert ("attention_total_variation" in row) is not exact


def test_float16_scales_the_loss_and_decays_no_bias(tmp_path):
    trainer, record = run(tmp_path, precision="mixed_float16", weight_decay=0.1, steps=4)
    scaling = trainer.optimizer
    assert isinstance(scaling, keras.optimizers.LossScaleOptimizer)
    decays = [scaling.inner_optimizer._use_weight_decay(v) for v in trainer.trainable_variables]
    assert decays == [True, False, True, False]
    assert np.isfinite(record["history"][-1]["loss"]) and int(scaling.iterations) == 4
    # It is gone on with: nothing is mended where nothing is broken.
    _, again = run(tmp_path, precision="mixed_float16", weight_decay=0.1, steps=4)
    assert again["history"] == record["history"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), steps=8, accumulate=2)[1]["history"]


@pytest.mark.parametrize("finished, number", [(1, "old"), (3, "old"), (3, "broken")])
@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_a_kill_while_the_backup_is_written_costs_an_epoch_and_nothing_else(
    finished, number, whole, tmp_path
):
    changes = {"steps": 8, "accumulate": 2}
    backup, trainer = tmp_path / "run" / "backup", model()
    metadata, fit_model = backup / "training_metadata.json", trainer.fit

    def fit_until_killed(*args, callbacks, **kwargs):
        def die(epoch, logs=None):
            if epoch == finished - 1:
                raise RuntimeError("killed")

        last = keras.callbacks.LambdaCallback(on_epoch_end=die)
        fit_model(*args, callbacks=[*callbacks, last], **kwargs)

    trainer.fit = fit_until_killed
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "run", trainer=trainer, **changes)
    before = metadata.with_name(f"{metadata.name}.bkp")
    assert before.is_file() == (finished > 1)
    # The new weights are there, and the number of epochs is not.
    if number == "broken":
        metadata.write_text('{"epo', encoding="utf-8")
    elif before.is_file():
        shutil.copy(before, metadata)
    else:
        metadata.unlink()
    _, resumed = run(tmp_path / "run", **changes)
    assert [row["epoch"] for row in resumed["history"]] == [0, 1, 2, 3]
    for a, b in zip(resumed["history"], whole, strict=True):
        assert (a["loss"], a["val_loss"]) == pytest.approx((b["loss"], b["val_loss"]), abs=1e-5)

    for name in ("latest.weights.h5", "latest.weights.h5.bkp"):
        (backup / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no whole backup"):
        run(tmp_path / "run", **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 13}, r"'training\.steps' must be a multiple of training\.steps_per_epoch"),
        ({"accumulate": 3}, r"'training\.accumulate' must be a divisor"),
        ({"precision": "float64"}, r"'training\.precision' must be one of float32"),
        ({"patience": -1}, r"'training\.patience' must be at least 0"),
        ({"warmup_steps": 12}, r"'training\.warmup_steps' must be at least 0 and below"),
    ],
)
def test_bad_training_sections(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{**TRAINING, **changes})


def test_a_model_section_gives_the_arguments_of_a_backbone():
    shape = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
    section = ModelConfig(**shape, num_features=4, dropout=0.0)
    assert section.arguments()["exact_window"] is None
    assert section.arguments()["sliding_window"] is None
    twin = ModelConfig(**shape, num_features=4, dropout=0.0, attention="sliding_window")
    assert twin.arguments()["sliding_window"] == 64
    with pytest.raises(ValueError, match=r"'model\.attention' must be one of performer, softmax"):
        ModelConfig(**shape, num_features=4, dropout=0.0, attention="linear")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it concerns glibc")
@pytest.mark.skipif(keras.config.backend() != "torch", reason="others allocate by their own means")
def test_pytorch_keeps_the_memory_that_it_frees():
    code = """
import resource
import torch
from training.command import start_keras

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
start_keras(None, seed=0)
print(before, min(faults() for _ in range(5)))
"""
    before, after = map(int, run_code(code).split())
    assert after < before / 10
