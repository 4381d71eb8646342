"""The training loop of every recipe: `fit`, with logs, validation and a backup it resumes from."""

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from rich.console import Console

from keras_performer.callbacks import AttentionHealth, RedrawFeatures
from keras_performer.layers import attention_layers
from training.data.batches import Batches
from training.data.registry import replacing
from training.distribution import (
    adamw,
    check_same_epoch,
    gather,
    share_work,
)
from training.results import peak_bytes
from training.sections import TrainingConfig

# What Keras calls the files of a backup.
_WEIGHTS = "latest.weights.h5"
_METADATA = "training_metadata.json"


def objective_of_tokens() -> dict[str, Any]:
    """Return the loss and the metrics, for `fit`, of logits for tokens of which some count.

    Both are means over the tokens with a weight. Keras's default would count the others too.
    """
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        "weighted_metrics": [keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    }


def fit(
    trainer: keras.Model,
    batches: Batches,
    validation_data: Any,
    training: TrainingConfig,
    *,
    loss: Any,
    weighted_metrics: list[Any],
    seed: int,
    output: Path,
    console: Console,
) -> dict[str, Any]:
    """Train a model, or go on with a run that was killed.

    A resumed run repeats the epoch in which it was killed: weights, optimizer, data, random numbers
    of dropout and the count of epochs without progress are those of a run that was not. The
    `backup` folder stays until the recipe removes it. `redraw_features_every` and
    `attention_health` are for feature attention: other models train without them.

    **Args**
        trainer: A built model that takes the batches.
        batches: Training data.
        validation_data: Arrays that are scored after each epoch.
        training: Section `[training]` of the config.
        loss: As in `compile`.
        weighted_metrics: As in `compile`.
        seed: Seed of the run.
        output: Folder of `backup/`, `history.jsonl` and `tensorboard/`.
        console: Where messages go.

    **Returns** What `metrics.json` says of the training: a row of figures for each epoch, seconds
    of this process and those of them in which batches were made, the most main memory that this
    process has held (None but on Linux), and whether patience ended it.

    **Raises** ValueError if neither the backup nor the one before it can be gone on from.
    """
    backup = output / "backup"
    data, validation_data, validation_batch_size = share_work(
        batches, validation_data, training.batch_size, loss
    )
    trainer.compile(_optimizer(training), loss=loss, weighted_metrics=weighted_metrics)
    _mend_backup(backup, training.steps_per_epoch)
    check_same_epoch(_finished_epochs(backup))
    log = _EpochLog(output / "history.jsonl", _finished_epochs(backup))
    epochs = training.steps // training.steps_per_epoch
    best = backup / "best.weights.h5"
    callbacks: list[keras.callbacks.Callback] = [
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: _begin_epoch(trainer, batches, seed, epoch)
        )
    ]
    if _has_features(trainer):
        if training.redraw_features_every:
            callbacks.append(RedrawFeatures(every=training.redraw_features_every, seed=seed))
        if training.attention_health:
            first = keras.tree.map_structure(lambda array: array[:1], validation_data[0])
            callbacks.append(AttentionHealth(first))
    # After the one before it, which adds to an epoch's figures.
    callbacks.append(log)
    if training.patience:
        if log.epochs_without_progress() >= training.patience:
            epochs = len(log.rows)
        callbacks += [
            _Patience(log, training.patience),
            keras.callbacks.ModelCheckpoint(
                str(best),
                monitor="val_loss",
                save_best_only=True,
                save_weights_only=True,
                initial_value_threshold=min(log.losses(), default=None),
            ),
        ]
    # Last, so that whatever the others wrote for an epoch is there when the epoch counts as done.
    callbacks.append(
        keras.callbacks.BackupAndRestore(
            str(backup), double_checkpoint=True, delete_checkpoint=False
        )
    )
    if importlib.util.find_spec("tensorflow") is None:
        console.print("No TensorBoard log: Keras needs TensorFlow to write it.")
    else:
        log_dir = str(output / "tensorboard")
        callbacks.append(keras.callbacks.TensorBoard(log_dir, write_graph=False))
    started = time.perf_counter()
    trainer.fit(
        data,
        shuffle=False,  # The walk is shuffled; Keras would shuffle its steps, and not repeatably.
        epochs=epochs,
        validation_data=validation_data,
        validation_batch_size=validation_batch_size,
        callbacks=callbacks,
        verbose=1 if console.is_terminal else 2,  # pyright: ignore[reportArgumentType]
    )
    if training.patience and best.is_file():
        trainer.load_weights(str(best))
    gather(trainer)
    return {
        "history": log.rows,
        "fit_seconds": time.perf_counter() - started,
        "input_seconds": batches.seconds,
        "peak_bytes": peak_bytes() if sys.platform == "linux" else None,
        "stopped_early": len(log.rows) < training.steps // training.steps_per_epoch,
    }


def _optimizer(training: TrainingConfig) -> keras.optimizers.Optimizer:
    # Keras's schedules count batches, also where weights move in every `accumulate`-th only.
    warmup = training.warmup_steps
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup else training.learning_rate,
        decay_steps=training.steps - warmup,
        alpha=0.05,
        warmup_target=training.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    optimizer = adamw(
        schedule,
        beta_2=training.beta_2,
        weight_decay=training.weight_decay,
        global_clipnorm=training.clip_norm,
        gradient_accumulation_steps=training.accumulate if training.accumulate > 1 else None,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale"])
    if training.precision == "mixed_float16":
        # Keras does so by itself if the policy of the trainer says float16, which is a plain model.
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def _has_features(trainer: keras.Model) -> bool:
    """Return whether a layer of the model has feature attention; the baselines have none."""
    return any(layer.feature_map is not None for layer in attention_layers(trainer))


def _begin_epoch(trainer: keras.Model, batches: Batches, seed: int, epoch: int) -> None:
    """Set everything that chance decides in an epoch to what follows from the seed."""
    batches.epoch = epoch
    # On PyTorch, layers without a seed of their own draw from its global generator.
    keras.utils.set_random_seed(int(np.random.SeedSequence((seed, 4, epoch)).generate_state(1)[0]))
    # Keras saves no state of its random generators with the weights.
    generators = [v for v in trainer.variables if v.path.endswith("seed_generator_state")]
    for number, state in enumerate(generators):
        state.assign(np.random.SeedSequence((seed, 3, number, epoch)).generate_state(2))


def _mend_backup(backup: Path, steps_per_epoch: int) -> None:
    """Return to the backup before the last one if a kill came while that was written.

    Keras writes the weights and then the number of epochs, in place; what they were before is in
    files that end with `.bkp`. After the first epoch there is no such file: the run starts anew.
    """
    for restore in (True, False):
        try:
            if _is_whole(backup, steps_per_epoch):
                return
        except (OSError, KeyError, ValueError):
            pass  # A file was cut short.
        for name in (_WEIGHTS, _METADATA) if restore else ():
            previous = backup / f"{name}.bkp"
            if previous.is_file():
                shutil.copy(previous, backup / name)
            else:
                (backup / name).unlink(missing_ok=True)
    raise ValueError(
        f"{backup} holds no whole backup: copy {_WEIGHTS} and {_METADATA} of one epoch there, or "
        "delete the folder to start anew."
    )


def _is_whole(backup: Path, steps_per_epoch: int) -> bool:
    """Return whether the weights of a backup are of the epoch that it says, or neither is there."""
    due = _finished_epochs(backup) * steps_per_epoch
    if not (backup / _WEIGHTS).is_file():
        return due == 0
    with h5py.File(backup / _WEIGHTS) as file:
        # The optimizer's first variable counts batches, with loss scaling that of the one inside.
        inner = "optimizer/inner_optimizer/vars/0"
        scaled = inner in file
        batches = int(file[inner if scaled else "optimizer/vars/0"][()])
    # What loss scaling skips is not counted.
    return batches == due or (scaled and batches < due)


def _finished_epochs(backup: Path) -> int:
    """Return how many epochs the backup in a folder has seen."""
    metadata = backup / _METADATA
    if not metadata.is_file():
        return 0
    return json.loads(metadata.read_text(encoding="utf-8"))["epoch"]


class _EpochLog(keras.callbacks.Callback):
    """Keeps the figures of every epoch in a file of JSON lines, over kills and resumes.

    `seconds` is what the epoch took, and `training_seconds` its part without the validation.
    """

    def __init__(self, path: Path, finished_epochs: int):
        super().__init__()
        self.path = path
        self.rows: list[dict[str, float]] = []
        if finished_epochs:
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            if len(lines) < finished_epochs:
                raise ValueError(
                    f"{path} has {len(lines)} lines for the {finished_epochs} epochs of the backup "
                    "beside it, so this run cannot go on: train into another folder, or remove "
                    "this one."
                )
            # A kill may have come between the log and the backup of an epoch.
            self.rows = [json.loads(line) for line in lines[:finished_epochs]]
        with replacing(path) as unfinished:
            rows = "".join(json.dumps(row) + "\n" for row in self.rows)
            unfinished.write_text(rows, encoding="utf-8")

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._begun = time.perf_counter()

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._trained = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        row = {"epoch": epoch, **{name: float(value) for name, value in (logs or {}).items()}}
        row["seconds"] = time.perf_counter() - self._begun
        row["training_seconds"] = self._trained - self._begun
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def losses(self) -> list[float]:
        """Return the validation loss of each epoch."""
        return [row["val_loss"] for row in self.rows]

    def epochs_without_progress(self) -> int:
        """Return the number of epochs since the lowest validation loss."""
        losses = self.losses()
        return len(losses) - 1 - int(np.argmin(losses)) if losses else 0


class _Patience(keras.callbacks.Callback):
    """Ends the training after some epochs without progress, counted over kills and resumes."""

    def __init__(self, log: _EpochLog, epochs: int):
        super().__init__()
        self.log = log
        self.epochs = epochs

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self.log.epochs_without_progress() >= self.epochs:
            self.model.stop_training = True
