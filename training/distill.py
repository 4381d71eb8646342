"""Turn a trained softmax masked language model of sequences into a Performer: see `--help`.

The job takes a model that others trained, replaces its attention, lets the attention learn from the
original's (`calibrate`: first the feature maps, then the projections), and trains the whole as a
masked language model, on true residues and on what the original says of them. It scores each stage
at the same masked residues of held-out sequences, saves a preset and loads it back.

The loss is the cross-entropy at masked residues to `(1 - w) truth + w original`, w being
`training.teacher_weight`: the true residue, and the probabilities that the original gives. But for
a constant the second part is the Kullback-Leibler divergence from the original.

Every letter of a sequence is a token. Sequences with letters that the model does not know, shorter
than `data.num_masks` or longer than the model's positions are left out.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.backbones import preset_facts
from training.command import make_console, make_parser, prepare_output, start_keras
from training.config import load_config
from training.converted import (
    MODELS,
    Masked,
    Score,
    calibrated,
    difference,
    load_model,
    mask_residues,
    score,
    summary,
)
from training.data.antibodies import CHAINS, load_antibodies, load_human_heavy_chains
from training.data.examples import texts_sha256
from training.data.protein_sources import load_proteins
from training.results import finish, run_facts, run_table, save_preset
from training.scores import log_frequencies, log_probabilities
from training.sections import Experiment, TrainingConfig, require, require_batch

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

STAGES = ("original", "converted", "calibrated", "distilled")
# Of a user's own sequences.
_HELDOUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `[data]`.

    Training reads human heavy chains, or a user's file. `evaluation` names a kind of AbNatiV's
    domains, whose held-out part is scored too; "" scores the held-out sequences alone.
    """

    num_masks: int
    heldout_sequences: int
    evaluation: str = ""

    def __post_init__(self) -> None:
        require(self.num_masks >= 1, "data.num_masks", "at least 1")
        require(self.heldout_sequences >= 2, "data.heldout_sequences", "at least 2")
        require(
            self.evaluation in ("", *CHAINS), "data.evaluation", f"'' or one of {', '.join(CHAINS)}"
        )


@dataclasses.dataclass(frozen=True)
class ConversionConfig:
    """Section `[conversion]`: the model, its new attention, and how that is calibrated.

    0 stands for no window; 0 steps leave a stage out.
    """

    source: str
    num_features: int
    exact_window: int
    feature_map_steps: int
    feature_map_rate: float
    attention_steps: int
    attention_rate: float
    num_sink_tokens: int = 0
    trainable_projection: bool = True

    def __post_init__(self) -> None:
        require(self.source in MODELS, "conversion.source", f"one of {', '.join(MODELS)}")
        require(self.num_features >= 1, "conversion.num_features", "at least 1")
        for name in ("exact_window", "num_sink_tokens", "feature_map_steps", "attention_steps"):
            require(getattr(self, name) >= 0, f"conversion.{name}", "at least 0")
        for name in ("feature_map_rate", "attention_rate"):
            require(getattr(self, name) > 0, f"conversion.{name}", "above 0")
        require(
            self.trainable_projection or not self.feature_map_steps,
            "conversion.feature_map_steps",
            "0 where conversion.trainable_projection is false",
        )


@dataclasses.dataclass(frozen=True)
class DistillTrainingConfig(TrainingConfig):
    """Section `[training]`: fine-tuning, and the share of the original's word in its targets.

    `validation_sequences` of those held out are scored after each epoch. With `patience`, which
    chooses weights by them, they do not count in the figures at the end.
    """

    teacher_weight: float = 0.5
    validation_sequences: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.teacher_weight <= 1, "training.teacher_weight", "between 0 and 1")
        require(self.validation_sequences >= 1, "training.validation_sequences", "at least 1")
        require(
            self.precision == "float32", "training.precision", "float32, as the imported weights"
        )


@dataclasses.dataclass(frozen=True)
class Config(Experiment):
    """The whole experiment."""

    data: DataConfig
    conversion: ConversionConfig
    training: DistillTrainingConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.training.redraw_features_every and self.conversion.trainable_projection),
            "training.redraw_features_every",
            "0 where conversion.trainable_projection is true: what is trained is not redrawn",
        )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the job.

    **Args**
        argv: Command-line arguments. Default: those of the process.

    **Returns** What `metrics.json` holds.

    **Raises** SystemExit, with one sentence, if the arguments or the data are not fit to be used.
    """
    started = time.perf_counter()
    console = make_console()
    arguments = parse_arguments(argv)

    # 1. Everything that can be wrong is found before anything is trained.
    try:
        if arguments.distribution is not None:
            raise ValueError("--distribution is not for this recipe, which has two models.")
        config = load_config(Config, arguments.config, arguments.set)
        start_keras(arguments.backend, config.seed)
        teacher = load_teacher(config, arguments.preset)
        train, heldout, source = read_sequences(config, teacher, arguments.fasta)
        start = preset_facts(arguments.preset)
        digest = texts_sha256(train, *heldout.values(), [start["preset_sha256"] or ""])
        student = convert(config, teacher)
        output = prepare_output(arguments.output, config, digest)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    name = str(arguments.preset or config.conversion.source)
    console.print(describe(config, name, source, train, heldout, student, output))

    # 2. One fixed set of masks for every stage.
    tokenizer = teacher.preprocessor.tokenizer
    length = 2 + max(map(len, [*train, *(s for part in heldout.values() for s in part)]))
    masked = {
        part: mask_residues(
            sequences,
            tokenizer,
            length,
            config.data.num_masks,
            np.random.default_rng((config.seed, 4, i)),
        )
        for i, (part, sequences) in enumerate(heldout.items())
    }
    validation = masked["heldout"].head(config.training.validation_sequences)
    masked["heldout"] = masked["heldout"].after(first_scored(config))
    original, trainer = as_trainer(teacher), as_trainer(student)
    found: dict[str, dict[str, Score]] = {}

    def measure(stage: str, model: Any) -> None:
        found[stage] = {
            part: score(model, data, config.training.batch_size) for part, data in masked.items()
        }

    # 3. Convert, calibrate, fine-tune. A run that was killed goes on where it was.
    measure("original", original)
    measure("converted", trainer)
    calibrate_student(config, student, teacher, train, length, output, console)
    measure("calibrated", trainer)
    record = fine_tune(config, trainer, original, train, validation, tokenizer, output, console)
    measure("distilled", trainer)
    metrics: dict[str, Any] = {"parameters": student.count_params(), "training": record}
    baseline = residue_frequencies(train, tokenizer)
    metrics["heldout"] = {
        part: compare({stage: found[stage][part] for stage in STAGES}, baseline, data)
        for part, data in masked.items()
    }
    for part, result in metrics["heldout"].items():
        console.print(comparison_table(part, result))

    # 4. Save the preset, and compare what was saved.
    x = masked["heldout"].head(4).inputs
    _, largest = save_preset(student, x, config.training.precision, output, console)
    metrics["reload_max_abs_difference"] = largest

    counts = {"train_sequences": len(train)}
    counts.update({f"{part}_sequences": len(x) for part, x in heldout.items()})
    metrics.update(run_facts(config, source, time.perf_counter() - started, **counts))
    metrics.update(start, model=name, mean_tokens=2 + float(np.mean([len(s) for s in train])))
    finish(output, metrics, console)
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser("distill", "Turn a trained softmax model into a Performer.")
    parser.add_argument(
        "--fasta", type=Path,
        help="your own sequences, plain or gzip, in place of the human heavy chains",
    )  # fmt: skip
    parser.add_argument(
        "--preset", type=Path, metavar="FOLDER",
        help="a masked language model of keras-hub with a token for each letter, in place of "
        "conversion.source",
    )  # fmt: skip
    return parser.parse_args(argv)


def load_teacher(config: Config, preset: Path | None) -> Any:
    """Return the original, a task with a preprocessor.

    **Raises** OSError or ValueError, with what to do, if it cannot be had.
    """
    import keras_hub

    if preset is None:
        return load_model(config.conversion.source)
    if not preset.is_dir():
        raise ValueError(f"{preset}: there is no such folder. Pass one that save_to_preset wrote.")
    teacher = keras_hub.models.MaskedLM.from_preset(str(preset))
    if teacher.preprocessor is None:
        raise ValueError(f"{preset}: the model has no preprocessor, so its tokens are not known.")
    return teacher


def read_sequences(
    config: Config, teacher: Any, fasta: Path | None
) -> tuple[list[str], dict[str, list[str]], str]:
    """Return training sequences, held-out ones by the name of their set, and the source's name.

    **Raises** OSError or ValueError, with what to do, if they cannot be had or are too few.
    """
    if fasta is None:
        train, heldout = load_human_heavy_chains()
        source = "human_heavy_chains"
    else:
        train, heldout, source = load_proteins("", _HELDOUT_SHARE, fasta)
    vocabulary = set(teacher.preprocessor.tokenizer.get_vocabulary())
    longest = teacher.preprocessor.sequence_length - 2

    def fitting(proteins: Sequence[Any]) -> list[str]:
        sequences = (protein.sequence for protein in proteins)
        return [
            s for s in sequences
            if config.data.num_masks <= len(s) <= longest and vocabulary.issuperset(s)
        ]  # fmt: skip

    def drawn(sequences: list[str]) -> list[str]:
        order = np.random.default_rng((config.seed, 5)).permutation(len(sequences))
        return [sequences[i] for i in order[: config.data.heldout_sequences]]

    inside = fitting(train)
    require_batch(
        source,
        len(inside),
        "sequences",
        config.training.batch_size,
        f"A sequence must have {config.data.num_masks} to {longest} letters that the model knows.",
    )
    parts = {"heldout": drawn(fitting(heldout))}
    if config.data.evaluation:
        known = set(inside)
        others = fitting(load_antibodies(config.data.evaluation)[1])
        parts["abnativ"] = drawn([s for s in others if s not in known])
    left = {part: len(sequences) for part, sequences in parts.items()}
    left["heldout"] -= first_scored(config)
    for part, count in left.items():
        if count < 2:
            raise ValueError(
                f"{source}: fewer than two sequences are left to score in {part!r}, less those by "
                f"which patience chooses weights: {first_scored(config)} of 'heldout'."
            )
    return inside, parts, source


def first_scored(config: Config) -> int:
    """Return from which held-out sequence on the figures are: patience chose weights on the others.

    Without patience all count.
    """
    return config.training.validation_sequences if config.training.patience else 0


def convert(config: Config, teacher: Any) -> Any:
    """Return the Performer with the original's weights."""
    from keras_performer.convert import performerize
    from keras_performer.feature_maps import FavorPlus

    section = config.conversion
    return performerize(
        teacher,
        feature_map=FavorPlus(
            section.num_features, trainable_projection=section.trainable_projection
        ),
        exact_window=section.exact_window or None,
        num_sink_tokens=section.num_sink_tokens,
        seed=config.seed,
    )


def as_trainer(task: Any) -> Any:
    """Return a plain Keras model of the same layers, which takes ids where a task takes strings."""
    import keras

    return keras.Model(task.input, task.output)


def describe(
    config: Config,
    name: str,
    source: str,
    train: Sequence[str],
    heldout: dict[str, list[str]],
    student: Any,
    output: Path,
) -> Table:
    """Return a table of what the job is going to do."""
    section, training = config.conversion, config.training
    parts = ", ".join(f"{len(x):,} of {part}" for part, x in heldout.items())
    rows = {
        "model": f"{name}, {student.count_params():,} parameters; {section.num_features} features, "
        f"exact window {section.exact_window}",
        "sequences": f"{source}: {len(train):,} to train on; held out: {parts}",
        "calibration": f"{section.feature_map_steps:,} steps of the feature maps, "
        f"{section.attention_steps:,} of attention",
        "training": f"{training.steps:,} steps of {training.batch_size} sequences, AdamW, weight "
        f"of the original's word {training.teacher_weight:g}",
    }
    return run_table("Distillation", rows, output)


def calibrate_student(
    config: Config,
    student: Any,
    teacher: Any,
    train: Sequence[str],
    length: int,
    output: Path,
    console: Console,
) -> None:
    """Let the student's attention learn from the teacher's, unless the backup has it already."""
    done = output / "backup" / "calibrated.weights.h5"
    if done.is_file():
        student.load_weights(str(done))
        return
    section, batch_size = config.conversion, config.training.batch_size
    stages = (
        ("feature_maps", section.feature_map_steps, section.feature_map_rate),
        ("attention", section.attention_steps, section.attention_rate),
    )
    rng = np.random.default_rng((config.seed, 6))
    for part, steps, rate in stages:
        if steps:
            data = mask_residues(
                [train[int(i)] for i in rng.integers(len(train), size=steps * batch_size)],
                teacher.preprocessor.tokenizer,
                length,
                config.data.num_masks,
                rng,
            )
            with Progress(console=console) as progress:
                calibrated(
                    student,
                    teacher,
                    data,
                    part,
                    rate=rate,
                    steps=steps,
                    batch_size=batch_size,
                    progress=progress,
                    label=f"calibrating {part}",
                )
    done.parent.mkdir(exist_ok=True)
    unfinished = done.with_name("unfinished.weights.h5")
    student.save_weights(str(unfinished))
    os.replace(unfinished, done)


def targets(labels: np.ndarray, logits: np.ndarray, teacher_weight: float) -> np.ndarray:
    """Return `(1 - w) truth + w original` as probabilities (B, P, V), float32.

    **Args**
        labels: True tokens (B, P).
        logits: The original's (B, P, V).
        teacher_weight: w.

    **Example**

    >>> targets(np.array([[1]]), np.zeros((1, 1, 2)), 0.5).tolist()
    [[[0.25, 0.75]]]
    """
    said = np.exp(log_probabilities(logits))
    truth = np.eye(logits.shape[-1])[labels]
    return ((1 - teacher_weight) * truth + teacher_weight * said).astype("float32")


def fine_tune(
    config: Config,
    trainer: Any,
    original: Any,
    train: Sequence[str],
    validation: Masked,
    tokenizer: Any,
    output: Path,
    console: Console,
) -> dict[str, Any]:
    """Train the student, or go on with a run that was killed; return what `loop.fit` returns."""
    import keras

    from training.data.batches import Batches
    from training.loop import fit

    training, num_tokens = config.training, trainer.output_shape[-1]
    length = validation.inputs["token_ids"].shape[1]

    def make_batch(indices: np.ndarray, rng: np.random.Generator) -> Any:
        sequences = [train[int(i)] for i in indices]
        x, labels = mask_residues(sequences, tokenizer, length, config.data.num_masks, rng)
        logits = np.zeros((*labels.shape, num_tokens))
        if training.teacher_weight:
            logits = original.predict_on_batch(x)
        return x, targets(labels, logits, training.teacher_weight)

    batches = Batches(
        [len(sequence) for sequence in train],
        make_batch,
        training.batch_size,
        training.steps_per_epoch,
        config.seed,
    )
    x, labels = validation
    truth = targets(labels, np.zeros((*labels.shape, num_tokens)), 0.0)
    return fit(
        trainer,
        batches,
        (x, truth),
        training,
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        seed=config.seed,
        output=output,
        console=console,
    )


def residue_frequencies(train: Sequence[str], tokenizer: Any) -> np.ndarray:
    """Return the log frequency (V,) of each token in the training sequences."""
    ids = {letter: tokenizer.token_to_id(letter) for letter in set("".join(train))}
    tokens = np.array([ids[letter] for letter in "".join(train)])
    return log_frequencies(tokens, tokenizer.vocabulary_size())


def compare(found: dict[str, Score], baseline: np.ndarray, data: Masked) -> dict[str, Any]:
    """Return the figures of the stages and of the frequencies of residues, at the same masks.

    **Returns** For each: accuracy, loss and perplexity, means over sequences with their standard
    errors; for a stage also accuracy and loss `minus_original`, sequence by sequence.
    """
    result: dict[str, Any] = {"sequences": len(data.labels), "masked_residues": data.labels.size}
    for stage, by_sequence in found.items():
        result[stage] = summary(by_sequence)
        result[stage]["minus_original"] = difference(by_sequence, found["original"])
    hits = data.labels == baseline.argmax()
    result["unigram"] = summary(Score(hits.mean(axis=1), -baseline[data.labels].mean(axis=1)))
    return result


def comparison_table(part: str, result: dict[str, Any]) -> Table:
    """Return the figures of `compare` as a table."""
    table = Table(
        title=f"{result['masked_residues']:,} masked residues of {result['sequences']:,} "
        f"sequences: {part}",
        caption="Means over sequences with their standard errors",
    )
    for column in ("", "accuracy, %", "minus original", "perplexity"):
        table.add_column(column, justify="right")

    def cell(value: dict[str, float], scale: float) -> str:
        return f"{scale * value['mean']:.2f} ± {scale * value['standard_error']:.2f}"

    for name in (*STAGES, "unigram"):
        row = result[name]
        gain = cell(row["minus_original"]["accuracy"], 100) if "minus_original" in row else ""
        table.add_row(name, cell(row["accuracy"], 100), gain, cell(row["perplexity"], 1))
    return table


if __name__ == "__main__":
    main()
