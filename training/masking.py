"""What the recipes that predict masked tokens share: rates, training, and figures in nats."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.scores import log_probabilities, mean_and_error
from training.sections import require

if TYPE_CHECKING:
    import keras

    from keras_performer.models import PerformerMaskedLM, PerformerMaskedLMPreprocessor

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.


def require_mask_rates(data: Any) -> None:
    """Raise ValueError unless the rates in a section `[data]` are shares.

    **Args**
        data: `mask_rate` is the share of the tokens to predict, `mask_token_rate` that of those
            which the mask token replaces, and `random_token_rate` that which a random one does.
    """
    require(0 < data.mask_rate < 1, "data.mask_rate", "between 0 and 1")
    require(0 <= data.mask_token_rate <= 1, "data.mask_token_rate", "between 0 and 1")
    require(
        0 <= data.random_token_rate <= 1 - data.mask_token_rate,
        "data.random_token_rate",
        "at least 0, and at most 1 with data.mask_token_rate",
    )


def make_model(
    config: Any, tokenizer: Any, *, takes_strings: bool = True
) -> "tuple[PerformerMaskedLM, PerformerMaskedLMPreprocessor]":
    """Return an untrained model, and the preprocessor that `mask_sequences` reads too.

    **Args**
        config: An `Experiment` with the sections `data`, `model` and `training`.
        tokenizer: What makes token ids.
        takes_strings: Whether the model has the preprocessor; without it examples are tokens.
    """
    from keras_performer.models import (
        PerformerEncoderBackbone,
        PerformerMaskedLM,
        PerformerMaskedLMPreprocessor,
    )

    data = config.data
    backbone = PerformerEncoderBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        **config.model.arguments(),
        seed=config.seed,
        dtype=config.training.precision,
    )
    preprocessor = PerformerMaskedLMPreprocessor(
        tokenizer,
        sequence_length=data.sequence_length,
        mask_selection_rate=data.mask_rate,
        mask_token_rate=data.mask_token_rate,
        random_token_rate=data.random_token_rate,
    )
    return PerformerMaskedLM(backbone, preprocessor if takes_strings else None), preprocessor


def train(
    model: "PerformerMaskedLM",
    preprocessor: "PerformerMaskedLMPreprocessor",
    config: Any,
    train_ids: Sequence[np.ndarray],
    lengths: np.ndarray,
    validation_batch: Any,
    output: Path,
    console: Console,
) -> "tuple[keras.Model, dict[str, Any]]":
    """Train the model, or go on with a run that was killed.

    **Args**
        model: An untrained model.
        preprocessor: Gives the length, the special tokens and the rates.
        config: An `Experiment` with the sections `data` and `training`.
        train_ids: Token ids of each example, without special tokens.
        lengths: Number of those tokens.
        validation_batch: What is scored after each epoch.
        output: Folder of the run.
        console: Where messages go.

    **Returns** A plain Keras model of the same layers, which takes masked batches where the task
    itself takes strings; and what `loop.fit` returns.
    """
    import keras

    from training.data.batches import Batches
    from training.data.masked_batches import mask_sequences
    from training.loop import fit, objective_of_tokens

    training, data = config.training, config.data

    def make_batch(indices: np.ndarray, rng: np.random.Generator) -> Any:
        rows = [train_ids[index] for index in indices]
        return mask_sequences(rows, preprocessor, rng, length_multiple=data.length_multiple)

    batches = Batches(
        np.minimum(lengths + 2, data.sequence_length),
        make_batch,
        training.batch_size,
        training.steps_per_epoch,
        config.seed,
        data.bucket_batches,
    )
    trainer = keras.Model(model.input, model.output, name="trainer")
    record = fit(
        trainer,
        batches,
        validation_batch,
        training,
        **objective_of_tokens(),
        seed=config.seed,
        output=output,
        console=console,
    )
    return trainer, record


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return the examples from `start` to `stop` of a batch."""
    x, y, weights = batch
    part = slice(start, stop)
    return {name: array[part] for name, array in x.items()}, y[part], weights[part]


def unigram_log_probabilities(rows: Iterable[np.ndarray], tokenizer: Any) -> np.ndarray:
    """Return the log frequency of every token in the examples, with one added to each count.

    **Returns** A vector over the vocabulary; minus infinity at special tokens, never predicted.
    """
    counts = np.zeros(tokenizer.vocabulary_size())
    for row in rows:
        counts += np.bincount(row, minlength=len(counts))
    counts += 1
    counts[list(tokenizer.special_token_ids)] = 0
    with np.errstate(divide="ignore"):
        return np.log(counts / counts.sum())


def compare(
    trainer: "keras.Model", baseline: np.ndarray, batch: Any, batch_size: int
) -> dict[str, Any]:
    """Score the model and the baseline at the masked places of held-out examples.

    **Args**
        trainer: A Keras model that takes masked batches.
        baseline: Log probability of each token.
        batch: All of the examples, masked.
        batch_size: How many the model reads at a time.

    **Returns** For each: cross-entropy, its exponential (perplexity) and accuracy over all masked
    tokens. Then the difference of the mean cross-entropy of each example, baseline minus model: its
    mean over examples and the standard error of that mean.
    """
    scores: dict[str, list[np.ndarray]] = {"model": [], "unigram": []}
    hits = {"model": 0.0, "unigram": 0.0}
    count = len(batch[1])
    for start in range(0, count, batch_size):
        x, y, weights = slice_batch(batch, start, start + batch_size)
        predicted = log_probabilities(trainer.predict_on_batch(x))
        for name, table in (("model", predicted), ("unigram", baseline[None, None])):
            table = np.broadcast_to(table, predicted.shape)
            surprise = -np.take_along_axis(table, y[..., None], -1)[..., 0]
            scores[name].append(np.where(weights > 0, surprise, 0.0))
            hits[name] += float(((table.argmax(-1) == y) * weights).sum())

    places = batch[2].sum(-1)
    result: dict[str, Any] = {}
    per_example = {}
    for name, parts in scores.items():
        totals = np.concatenate(parts).sum(-1)
        # An example of nothing but unknown tokens has no place.
        per_example[name] = totals[places > 0] / places[places > 0]
        cross_entropy = float(totals.sum() / places.sum())
        result[name] = {
            "cross_entropy": cross_entropy,
            "perplexity": float(np.exp(cross_entropy)),
            "accuracy": hits[name] / float(places.sum()),
        }
    differences = per_example["unigram"] - per_example["model"]
    result["difference"] = mean_and_error(differences)
    return result


def comparison_table(result: dict[str, Any], title: str, examples: str) -> Table:
    """Return the figures of `compare` as a table.

    **Args**
        result: The figures.
        title: Of the table.
        examples: What an example is called, in the plural.
    """
    difference = result["difference"]
    table = Table(
        title=title,
        caption=f"Cross-entropy below the unigram baseline's, mean over {examples}: "
        f"{difference['mean']:.4f} ± {difference['standard_error']:.4f} "
        f"({difference['mean'] / difference['standard_error']:.1f} standard errors)",
    )
    for column in ("", "cross-entropy", "perplexity", "accuracy"):
        table.add_column(column, justify="right")
    for name, label in (("model", "model"), ("unigram", "unigram frequencies")):
        row = result[name]
        table.add_row(
            label,
            f"{row['cross_entropy']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['accuracy']:.2%}",
        )
    return table
