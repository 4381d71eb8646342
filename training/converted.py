"""Models that others trained, converted: get one, calibrate and tune it, and score it.

`training.distill` and `training.benchmarks.conversion` share it. A model is scored by the residues
that it guesses at masked places, the same for all that are compared.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.progress import Progress

from training.data.padded_rows import bracket, pad_rows
from training.data.registry import fetch_python_package
from training.scores import mean_and_error, surprise

if TYPE_CHECKING:
    import keras

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.


class Source(NamedTuple):
    """A model of antibodies, and where it comes from."""

    package: tuple[str, str, str]
    """Name, version and sha256 of the Python package that carries it."""
    chain: str
    """What it learned, a key of `training.data.antibodies.CHAINS`."""


SAPIENS = ("sapiens", "1.0.2", "9e03c81118e362b81053dcb53c8cdceaa53f62d07668cc2f31fcd478536d8722")
ANTIBERTY = (
    "antiberty",
    "0.1.3",
    "30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
)
MODELS = {
    "sapiens-heavy": Source(SAPIENS, "heavy"),
    "sapiens-light": Source(SAPIENS, "light"),
    "antiberty": Source(ANTIBERTY, "heavy"),
}


def load_model(name: str) -> Any:
    """Import one of `MODELS`, a task with a preprocessor, from its wheel.

    **Raises** OSError or ValueError, with what to do, if the wheel cannot be had; ImportError
    without PyTorch.
    """
    from keras_performer.convert import from_antiberty, from_sapiens

    package, chain = MODELS[name]
    wheel = fetch_python_package(*package)
    return from_antiberty(wheel) if package == ANTIBERTY else from_sapiens(wheel, chain)


class Masked(NamedTuple):
    """Sequences with masked residues: B of them, T tokens long, P masks in each."""

    inputs: dict[str, np.ndarray]
    """What the models take: token_ids and padding_mask (B, T), mask_positions (B, P)."""
    labels: np.ndarray
    """The true tokens (B, P)."""

    def head(self, count: int) -> "Masked":
        """The first `count` sequences."""
        return Masked({k: x[:count] for k, x in self.inputs.items()}, self.labels[:count])

    def after(self, count: int) -> "Masked":
        """All but the first `count` sequences."""
        return Masked({k: x[count:] for k, x in self.inputs.items()}, self.labels[count:])


def mask_residues(
    sequences: Sequence[str], tokenizer: Any, length: int, num_masks: int, rng: np.random.Generator
) -> Masked:
    """Replace `num_masks` residues of each sequence, drawn without repeats, by the mask token."""
    rows = [bracket(np.array([*map(tokenizer.token_to_id, s)]), tokenizer) for s in sequences]
    inputs = pad_rows(rows, length, 0, tokenizer.pad_token_id)
    positions = np.array(
        [np.sort(1 + rng.permutation(len(sequence))[:num_masks]) for sequence in sequences], "int32"
    )
    labels = np.take_along_axis(inputs["token_ids"], positions, axis=1)
    np.put_along_axis(inputs["token_ids"], positions, tokenizer.mask_token_id, axis=1)
    return Masked({**inputs, "mask_positions": positions}, labels)


def calibrated(
    student: Any,
    teacher: Any,
    data: Masked,
    part: str,
    *,
    rate: float,
    steps: int,
    batch_size: int,
    progress: Progress,
    label: str,
) -> float:
    """Let a student's attention learn from the teacher's, and return the seconds."""
    from keras_performer.convert import calibrate

    begun = time.perf_counter()
    calibrate(
        student,
        teacher,
        data.head(batch_size * steps).inputs,
        train=part,
        optimizer=_optimizer(rate, steps),
        batch_size=batch_size,
        callbacks=[_shown(progress, label, steps)],
        shuffle=False,  # drawn at random, and so the same for all
        verbose=0,
    )
    return time.perf_counter() - begun


def tuned(
    model: Any,
    data: Masked,
    *,
    rate: float,
    steps: int,
    batch_size: int,
    progress: Progress,
    label: str,
) -> float:
    """Train a model to guess masked residues, and return the seconds."""
    import keras

    model.compile(
        optimizer=_optimizer(rate, steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    begun = time.perf_counter()
    data = data.head(batch_size * steps)
    model.fit(
        data.inputs,
        data.labels,
        batch_size=batch_size,
        callbacks=[_shown(progress, label, steps)],
        shuffle=False,  # drawn at random, and so the same for all
        verbose=0,
    )
    return time.perf_counter() - begun


def _optimizer(rate: float, steps: int) -> "keras.optimizers.Optimizer":
    import keras

    # A tenth of the steps to warm up: the first steps of Adam would undo what the weights know.
    warmup = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=rate, warmup_steps=warmup
    )
    return keras.optimizers.Adam(schedule, global_clipnorm=1.0)


def _shown(progress: Progress, label: str, steps: int) -> "keras.callbacks.Callback":
    import keras

    task = progress.add_task(label, total=steps)
    return keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: progress.advance(task)
    )


class Score(NamedTuple):
    """Means over the masked residues of each sequence, (B,)."""

    accuracy: np.ndarray
    loss: np.ndarray


def score(model: Any, data: Masked, batch_size: int) -> Score:
    """Let a model guess the masked residues."""
    logits = model.predict(data.inputs, batch_size=batch_size, verbose=0)
    hits = logits.argmax(axis=-1) == data.labels
    return Score(hits.mean(axis=1), surprise(logits, data.labels).mean(axis=1))


def summary(found: Score) -> dict[str, dict[str, float]]:
    """Means over sequences with their standard errors, that of perplexity to first order."""
    loss = mean_and_error(found.loss)
    perplexity = float(np.exp(loss["mean"]))
    return {
        "accuracy": mean_and_error(found.accuracy),
        "loss": loss,
        "perplexity": {"mean": perplexity, "standard_error": perplexity * loss["standard_error"]},
    }


def difference(found: Score, other: Score) -> dict[str, dict[str, float]]:
    """The mean of `found` minus `other`, sequence by sequence."""
    return {
        "accuracy": mean_and_error(found.accuracy - other.accuracy),
        "loss": mean_and_error(found.loss - other.loss),
    }
