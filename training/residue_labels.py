"""Train a labeller of residues, such as their secondary structure, and measure it: see `--help`.

The job reads proteins with a state for each residue, trains a `PerformerTokenClassifier` from
scratch or on a pretrained encoder, compares it on the test split with always choosing the most
frequent state, saves a preset and loads it back.

Of a protein longer than `data.sequence_length` training sees a random window, another one in each
pass; for scoring it is cut into windows, so that every residue counts once.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.backbones import (
    add_preset_flag,
    backbone_phrase,
    build_backbone,
    preset_facts,
    tokenizer_of,
)
from training.command import (
    make_console,
    make_parser,
    prepare_output,
    start_keras,
    use_devices,
    write_json,
)
from training.config import load_config
from training.data.examples import Splits, columns_of, load_examples, texts_sha256
from training.data.padded_rows import bracket, pad_rows
from training.data.secondary_structure import Q3, Q8, load_secondary_structure, to_q3
from training.results import (
    finish,
    predict_in_batches,
    run_facts,
    run_table,
    save_preset,
    spread,
)
from training.scores import (
    class_rows,
    confusion_matrix,
    log_frequencies,
    mean_and_error,
    surprise,
)
from training.sections import (
    Experiment,
    ModelConfig,
    TrainingConfig,
    require,
    require_batch,
    require_buckets,
)

if TYPE_CHECKING:
    import keras

    from keras_performer.models import PerformerTokenClassifier

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

STATES = {8: Q8, 3: Q3}
# A residue without a known state: it is read, but neither learned nor scored.
UNKNOWN = "-"
# Of the eight states, in their order, the index of each among the three.
_Q3_INDEX = np.array([Q3.index(state) for state in to_q3(Q8)])


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `[data]`.

    `text_field` and `label_field` are those of a user's file.
    """

    states: int
    sequence_length: int
    length_multiple: int = 0
    bucket_batches: int = 1
    text_field: str = "sequence"
    label_field: str = "labels"

    def __post_init__(self) -> None:
        require(self.states in STATES, "data.states", "8 or 3")
        require(self.sequence_length >= 8, "data.sequence_length", "at least 8")
        require_buckets(self)
        for name in ("text_field", "label_field"):
            require(bool(getattr(self, name)), f"data.{name}", "the name of a field")


@dataclasses.dataclass(frozen=True)
class LabellerTrainingConfig(TrainingConfig):
    """Section `[training]`, and how many windows are scored after each epoch; 0 takes all."""

    validation_windows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.validation_windows >= 0, "training.validation_windows", "at least 0 (all)")


@dataclasses.dataclass(frozen=True)
class Config(Experiment):
    """The whole experiment."""

    data: DataConfig
    model: ModelConfig
    training: LabellerTrainingConfig


@dataclasses.dataclass(frozen=True)
class Chains:
    """One split: proteins, and for each residue the index of its state, or -1."""

    sequences: list[str]
    states: list[np.ndarray]

    def windows(self, room: int) -> list[tuple[int, int]]:
        """Return protein and first residue of the windows that hold every residue once."""
        return [
            (chain, start)
            for chain, sequence in enumerate(self.sequences)
            for start in range(0, len(sequence), room)
        ]


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

    # 1. Everything that can be wrong is found before anything is compiled.
    try:
        config = load_config(Config, arguments.config, arguments.set)
        use_devices(arguments, config)
        splits, source = read_splits(config, arguments.file)
        parts = {
            split: read_chains(examples, config.data.states, source)
            for split, examples in splits.items()
        }
        check_enough(parts, config, source)
        start = preset_facts(arguments.preset)
        digest = texts_sha256(*columns_of(splits), [start["preset_sha256"] or ""])
        model = build_model(config, arguments.preset, arguments.backend)
        output = prepare_output(arguments.output, config, digest)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    console.print(describe(config, parts, source, model, arguments.preset, output))

    # 2. Train. A run that was killed goes on where its last epoch ended.
    trainer, record = train(model, config, parts, output, console)

    # 3. Compare with always choosing the most frequent state.
    metrics: dict[str, Any] = {"parameters": model.count_params(), "training": record}
    metrics["test"] = compare(trainer, parts["train"], parts["test"], tokenizer_of(model), config)
    console.print(comparison_table(metrics["test"]))

    # 4. Save the preset, and compare what was saved.
    windows = parts["test"].windows(room_of(config))[:4]
    x, _, _ = make_batch(parts["test"], windows, tokenizer_of(model), config)
    _, largest = save_preset(model, x, config.training.precision, output, console)
    metrics["reload_max_abs_difference"] = largest
    write_json(output / "preset" / "classes.json", list(STATES[config.data.states]))

    counts = {f"{split}_proteins": len(chains.sequences) for split, chains in parts.items()}
    metrics.update(run_facts(config, source, time.perf_counter() - started, **counts))
    metrics.update(start, attention=model.backbone.attention)
    finish(output, metrics, console)
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser("residue_labels", "Train a labeller of residues.")
    parser.add_argument(
        "--file", type=Path,
        help="your own JSONL or CSV, gzip or not, in place of the PDB chains: a sequence, and a "
        f"string of one letter of {Q8} per residue, or {UNKNOWN} where it is not known; split by "
        "the hash of the sequences",
    )  # fmt: skip
    add_preset_flag(parser)
    return parser.parse_args(argv)


def read_splits(config: Config, file: Path | None) -> tuple[Splits, str]:
    """Return the PDB chains or a user's own, and a phrase that names the source."""
    if file is None:
        return load_secondary_structure(), "secondary_structure"
    return load_examples(file, config.data.text_field, config.data.label_field), str(file)


def read_chains(examples: Sequence[Any], num_states: int, source: str) -> Chains:
    """Return the proteins with their states as indices.

    **Raises** ValueError if a protein has not one known letter for each residue.
    """
    states = []
    for example in examples:
        if len(example.label) != len(example.text):
            raise ValueError(
                f"{source}: {example.name} has {len(example.text)} residues and "
                f"{len(example.label)} labels. Pass one letter for each residue."
            )
        odd = set(example.label) - set(Q8 + UNKNOWN)
        if odd:
            raise ValueError(
                f"{source}: {example.name} has the label {min(odd)!r}. Labels are {Q8}, and "
                f"{UNKNOWN} where none is known."
            )
        letters = to_q3(example.label) if num_states == 3 else example.label
        # `find` gives -1 for the unknown.
        states.append(np.array([STATES[num_states].find(letter) for letter in letters], "int32"))
    return Chains([example.text for example in examples], states)


def check_enough(parts: dict[str, Chains], config: Config, source: str) -> None:
    """Raise ValueError unless there is a batch to train on, and something to score."""
    count = len(parts["train"].sequences)
    require_batch(source, count, "proteins", config.training.batch_size)
    for split, chains in parts.items():
        if not any((states >= 0).any() for states in chains.states):
            raise ValueError(f"{source}: no residue of the {split} split has a known label.")


def build_model(
    config: Config, preset: str | None, backend: str | None
) -> "PerformerTokenClassifier":
    """Choose the backend, seed it, and return the model with its preprocessor."""
    start_keras(backend, config.seed)
    from keras_performer.models import (
        PerformerEncoderBackbone,
        PerformerTokenClassifier,
        PerformerTokenClassifierPreprocessor,
        ProteinTokenizer,
    )

    tokenizer = ProteinTokenizer()
    encoder = build_backbone(
        PerformerEncoderBackbone,
        config.model,
        tokenizer.vocabulary_size(),
        tokenizer,
        config.data.sequence_length,
        preset,
        config.seed,
        config.training.precision,
    )
    preprocessor = PerformerTokenClassifierPreprocessor(
        tokenizer, sequence_length=config.data.sequence_length
    )
    return PerformerTokenClassifier(
        encoder, config.data.states, preprocessor, dropout=config.model.dropout
    )


def describe(
    config: Config,
    parts: dict[str, Chains],
    source: str,
    model: "PerformerTokenClassifier",
    preset: str | None,
    output: Path,
) -> Table:
    """Return a table of what the job is going to do."""
    training = config.training
    train, validation, test = (len(parts[s].sequences) for s in ("train", "validation", "test"))
    passes = training.steps * training.batch_size / train
    rows = {
        "proteins": f"{source}: {train:,} to train on, {validation:,} to validate, {test:,} to "
        f"test, {config.data.states} states",
        "input": f"at most {config.data.sequence_length:,} tokens",
        "model": f"{backbone_phrase(model.backbone, preset)}; {model.count_params():,} parameters",
        "training": f"{training.steps:,} steps of {training.batch_size} proteins ({passes:.1f} "
        f"passes), AdamW, {training.precision}",
    }
    return run_table("Labels of residues", rows, output)


def room_of(config: Config) -> int:
    """Return the number of residues in a window, which has a start and an end token too."""
    return config.data.sequence_length - 2


def make_batch(
    chains: Chains, windows: Sequence[tuple[int, int]], tokenizer: Any, config: Config
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Return inputs, states (B, T), and a weight (B, T) of 1 where a residue has a known state.

    **Args**
        chains: A split.
        windows: Protein and first residue of each window.
        tokenizer: Makes one token of each residue.
        config: Gives the lengths.
    """
    room = room_of(config)
    rows = [
        bracket(tokenizer.tokenize(chains.sequences[chain][start : start + room]), tokenizer)
        for chain, start in windows
    ]
    x = pad_rows(rows, config.data.sequence_length, config.data.length_multiple)
    labels = np.full(x["token_ids"].shape, -1, "int32")
    for row, (chain, start) in zip(labels, windows, strict=True):
        states = chains.states[chain][start : start + room]
        row[1 : len(states) + 1] = states
    known = labels >= 0
    return x, np.where(known, labels, 0), known.astype("float32")


def train(
    model: "PerformerTokenClassifier",
    config: Config,
    parts: dict[str, Chains],
    output: Path,
    console: Console,
) -> "tuple[keras.Model, dict[str, Any]]":
    """Train the model, or go on with a run that was killed.

    **Returns** A plain Keras model of the same layers, which takes token ids where the task itself
    takes strings; and what `loop.fit` returns.
    """
    import keras

    from training.data.batches import Batches
    from training.loop import fit, objective_of_tokens

    training, data, room = config.training, config.data, room_of(config)
    chains, tokenizer = parts["train"], tokenizer_of(model)
    lengths = np.array([len(sequence) for sequence in chains.sequences])

    def training_batch(indices: np.ndarray, rng: np.random.Generator) -> Any:
        starts = rng.integers(np.maximum(lengths[indices] - room, 0) + 1)
        return make_batch(chains, list(zip(indices, starts, strict=True)), tokenizer, config)

    batches = Batches(
        np.minimum(lengths, room),
        training_batch,
        training.batch_size,
        training.steps_per_epoch,
        config.seed,
        data.bucket_batches,
    )
    windows = parts["validation"].windows(room)
    scored = [windows[i] for i in spread(len(windows), training.validation_windows)]
    trainer = keras.Model(model.input, model.output, name="trainer")
    record = fit(
        trainer,
        batches,
        make_batch(parts["validation"], scored, tokenizer, config),
        training,
        **objective_of_tokens(),
        seed=config.seed,
        output=output,
        console=console,
    )
    return trainer, record


def compare(
    trainer: Any, train: Chains, test: Chains, tokenizer: Any, config: Config
) -> dict[str, Any]:
    """Score the model and the most frequent state on every residue of the test split.

    **Returns** For each: Q8 (unless there are three states) and Q3, over residues and as the mean
    over proteins with its standard error, and cross-entropy in nats a residue (of the training
    split's frequencies for the baseline). Of eight states, Q3 counts those predicted that belong to
    the right one of the three. Then precision, recall, F1 and number of residues of each state.
    """
    num_states, room = config.data.states, room_of(config)
    windows = test.windows(room)
    lengths = [len(test.states[chain][start : start + room]) for chain, start in windows]
    # All residues of the split in a row; `offsets` tells where a protein begins.
    offsets = np.cumsum([0, *(len(states) for states in test.states)])
    logits = np.zeros((offsets[-1], num_states), "float32")
    for indices, outputs in predict_in_batches(
        trainer,
        lengths,
        lambda chosen: make_batch(test, [windows[i] for i in chosen], tokenizer, config)[0],
        config.training.batch_size,
    ):
        for index, output in zip(indices, outputs, strict=True):
            chain, start = windows[index]
            first = offsets[chain] + start
            logits[first : first + lengths[index]] = output[1 : lengths[index] + 1]

    states = np.concatenate(test.states)
    known = states >= 0
    owners = np.repeat(np.arange(len(test.states)), np.diff(offsets))[known]
    labels, logits = states[known], logits[known]
    all_train = np.concatenate(train.states)
    frequencies = log_frequencies(all_train[all_train >= 0], num_states)
    confusion = confusion_matrix(labels, logits.argmax(-1), num_states)
    return {
        "proteins": len(np.unique(owners)),
        "residues": len(labels),
        "model": scores(logits, labels, owners),
        "majority": scores(np.broadcast_to(frequencies, logits.shape), labels, owners),
        "classes": class_rows(confusion, STATES[num_states], "residues"),
    }


def scores(logits: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> dict[str, Any]:
    """Return the figures of logits (N, states) for labels (N,).

    **Args**
        logits: Log probabilities up to a constant in each row.
        labels: True states.
        owners: The protein (N,) that each residue belongs to.
    """
    predictions = logits.argmax(-1)
    hits = {"q3": predictions == labels}
    if logits.shape[-1] == len(Q8):
        hits = {"q8": hits["q3"], "q3": _Q3_INDEX[predictions] == _Q3_INDEX[labels]}
    result: dict[str, Any] = {}
    counts = np.bincount(owners)
    for name, hit in hits.items():
        result[name] = float(hit.mean())
        shares = np.bincount(owners, hit)[counts > 0] / counts[counts > 0]
        result[f"{name}_per_protein"] = mean_and_error(shares)
    result["cross_entropy"] = float(surprise(logits, labels).mean())
    return result


def comparison_table(result: dict[str, Any]) -> Table:
    """Return the figures of `compare` as a table."""
    table = Table(
        title=f"{result['residues']:,} residues of {result['proteins']:,} proteins of the test "
        "split",
        caption="Share of right states, over residues and as the mean over proteins",
    )
    names = [name for name in ("q8", "q3") if name in result["model"]]
    columns = [column for name in names for column in (name.upper(), f"{name.upper()} a protein")]
    for column in ("", *columns, "cross-entropy"):
        table.add_column(column, justify="right")
    for key, label in (("model", "model"), ("majority", "most frequent state")):
        row, cells = result[key], []
        for name in names:
            mean, error = row[f"{name}_per_protein"].values()
            cells += [f"{row[name]:.2%}", f"{mean:.2%}" + (f" ± {error:.2%}" if error else "")]
        table.add_row(label, *cells, f"{row['cross_entropy']:.4f}")
    return table


if __name__ == "__main__":
    main()
