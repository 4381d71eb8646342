"""Train a classifier of proteins, documents, ListOps or images: `--help` names the flags.

The job reads labelled sequences, trains a `PerformerSequenceClassifier` from scratch or on a
pretrained encoder, compares it on the test split with always choosing the most frequent class,
saves a preset and loads it back.

What is longer than `data.sequence_length` is cropped. Of a protein the first and the last half of
the room stay: signals that send it to its place sit at its ends. Of a document training sees a
random window, another one in each pass, and scoring its start. ListOps and the pixels of an image
are cut at their end.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.backbones import add_preset_flag, backbone_phrase, build_backbone, preset_facts
from training.command import (
    make_console,
    make_parser,
    prepare_output,
    start_keras,
    use_devices,
    write_json,
)
from training.config import load_config
from training.data import digits, list_ops
from training.data.documents import (
    TFDS,
    load_brown,
    load_linux_doc,
    load_spam_assassin,
    load_tfds,
)
from training.data.enzyme_class import load_enzyme_classes
from training.data.examples import (
    Splits,
    columns_of,
    labels_of,
    load_examples,
    texts_sha256,
)
from training.data.folds import NUM_FOLDS
from training.data.localisation import load_localisation
from training.data.padded_rows import bracket, pad_rows
from training.data.peptides import load_peptides
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
    macro_f1,
    matthews_correlation,
    surprise,
    wilson_interval,
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

    from keras_performer.models import PerformerSequenceClassifier

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

# What each source holds, which decides how it becomes tokens and is cropped.
KINDS = {
    "localisation": "proteins",
    "localisation_folds": "proteins",
    "enzyme_class": "proteins",
    "peptides": "proteins",
    "brown": "documents",
    "spam_assassin": "documents",
    "linux_doc": "documents",
    "list_ops": "list_ops",
    "digits": "pixels",
}
# What makes tokens of the texts of a kind that a saved preset takes as tokens, not as strings.
ENCODERS = {"list_ops": list_ops.encode, "pixels": digits.encode}
PROTEIN_LETTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ*-")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `[data]`.

    `text_field` and `label_field` are read for a user's file and TensorFlow Datasets, and `fold`
    for "brown", "linux_doc" and "localisation_folds", each of whose five folds is the test once.
    """

    source: str
    sequence_length: int
    length_multiple: int = 0
    bucket_batches: int = 1
    text_field: str = "text"
    label_field: str = "label"
    fold: int = 0

    def __post_init__(self) -> None:
        known = self.source in KINDS or self.source.startswith(TFDS)
        require(known, "data.source", f"one of {', '.join(KINDS)}, {TFDS}NAME")
        require(self.sequence_length >= 8, "data.sequence_length", "at least 8")
        require_buckets(self)
        for name in ("text_field", "label_field"):
            require(bool(getattr(self, name)), f"data.{name}", "the name of a field")
        require(0 <= self.fold < NUM_FOLDS, "data.fold", f"from 0 to {NUM_FOLDS - 1}")

    @property
    def kind(self) -> str:
        """What the source holds: "proteins", "documents", "list_ops" or "pixels"."""
        return KINDS.get(self.source, "documents")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Section `[head]`: how the encoder's states become one vector, and the layers after it.

    `hidden_dim` is the width of a tanh layer before the last; 0 stands for none.
    """

    pooling: str = "mean"
    hidden_dim: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require(self.pooling in ("mean", "first"), "head.pooling", "mean or first")
        require(self.hidden_dim >= 0, "head.hidden_dim", "at least 0 (none)")
        require(0 <= self.dropout < 1, "head.dropout", "at least 0 and below 1")


@dataclasses.dataclass(frozen=True)
class ClassifierTrainingConfig(TrainingConfig):
    """Section `[training]`, and how many examples are scored after each epoch; 0 takes all."""

    validation_examples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.validation_examples >= 0, "training.validation_examples", "at least 0 (all)")


@dataclasses.dataclass(frozen=True)
class Config(Experiment):
    """The whole experiment."""

    data: DataConfig
    model: ModelConfig
    training: ClassifierTrainingConfig
    head: HeadConfig = HeadConfig()


@dataclasses.dataclass(frozen=True)
class Part:
    """One split: strings, or arrays of ListOps and pixels, and the class (N,) of each."""

    texts: Any
    labels: np.ndarray

    def lengths(self, kind: str) -> np.ndarray:
        """Return the number of tokens of each, without special ones."""
        if kind == "documents":
            return np.array([len(text.encode("utf-8", "surrogateescape")) for text in self.texts])
        return np.array([len(text) for text in self.texts])


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Labelled examples, and what they are.

    **Args**
        kind: "proteins", "documents", "list_ops" or "pixels".
        source: A phrase that names the source.
        classes: The names of the classes.
        parts: `train`, `validation` and `test`.
        sha256: What tells these data from others.
    """

    kind: str
    source: str
    classes: list[str]
    parts: dict[str, Part]
    sha256: str

    @property
    def takes_strings(self) -> bool:
        """Whether examples are strings, which a saved preset can take, and not tokens."""
        return self.kind not in ENCODERS


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
        corpus = read_corpus(config, arguments.file)
        start = preset_facts(arguments.preset)
        digest = texts_sha256([corpus.sha256, start["preset_sha256"] or ""])
        model = build_model(config, corpus, arguments.preset, arguments.backend)
        output = prepare_output(arguments.output, config, digest)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    console.print(describe(config, corpus, model, arguments.preset, output))

    # 2. Train. A run that was killed goes on where its last epoch ended.
    trainer, record = train(model, config, corpus, output, console)

    # 3. Compare with always choosing the most frequent class.
    metrics: dict[str, Any] = {"parameters": model.count_params(), "training": record}
    test = corpus.parts["test"]
    read = input_maker(config, corpus, test)
    metrics["test"] = compare(trainer, corpus, read, config.training.batch_size)
    console.print(comparison_table(metrics["test"]))

    # 4. Save the preset, and compare what was saved.
    x = read(np.arange(min(4, len(test.labels))), None)
    _, largest = save_preset(model, x, config.training.precision, output, console)
    metrics["reload_max_abs_difference"] = largest
    write_json(output / "preset" / "classes.json", corpus.classes)

    counts = {f"{split}_examples": len(part.labels) for split, part in corpus.parts.items()}
    seconds = time.perf_counter() - started
    metrics.update(run_facts(config, corpus.source, seconds, **counts))
    metrics.update(start, attention=model.backbone.attention)
    finish(output, metrics, console)
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser("classification", "Train a classifier of sequences or documents.")
    parser.add_argument(
        "--file", type=Path,
        help="your own JSONL or CSV, gzip or not, in place of data.source; it is read as what that "
        "source holds (proteins, documents, ListOps or pixels), split by the hash of the texts",
    )  # fmt: skip
    add_preset_flag(parser)
    return parser.parse_args(argv)


def read_corpus(config: Config, file: Path | None) -> Corpus:
    """Read the examples of the config's source, or a user's own."""
    data = config.data
    source = data.source if file is None else str(file)
    if file is None and data.source == "list_ops":
        made = list_ops.load_list_ops()
        parts = {name: Part(part, part.labels.astype("int32")) for name, part in made.items()}
        # They follow from the generator, so its name tells them apart.
        corpus = Corpus("list_ops", source, list("0123456789"), parts, texts_sha256([source]))
    else:
        corpus = _labelled(read_splits(data, file), data.kind, source)
    count = len(corpus.parts["train"].labels)
    require_batch(source, count, "examples", config.training.batch_size)
    return corpus


def read_splits(data: DataConfig, file: Path | None) -> Splits:
    """Read a user's file, or a source that comes as strings."""
    if file is not None:
        return load_examples(file, data.text_field, data.label_field)
    if data.source.startswith(TFDS):
        return load_tfds(data.source.removeprefix(TFDS), data.text_field, data.label_field)
    loaders: dict[str, Callable[[], Splits]] = {
        "localisation": load_localisation,
        "localisation_folds": lambda: load_localisation(data.fold),
        "enzyme_class": load_enzyme_classes,
        "peptides": load_peptides,
        "brown": lambda: load_brown(data.fold),
        "spam_assassin": load_spam_assassin,
        "linux_doc": lambda: load_linux_doc(data.fold),
        "digits": digits.load_digits,
    }
    return loaders[data.source]()


def _labelled(splits: Splits, kind: str, source: str) -> Corpus:
    classes = labels_of(splits["train"])
    if len(classes) < 2:
        raise ValueError(
            f"{source}: the training split needs two classes or more. Received: {classes}"
        )
    parts = {}
    for split, examples in splits.items():
        unseen = [name for name in labels_of(examples) if name not in classes]
        if unseen:
            raise ValueError(
                f"{source}: no training example has the label {unseen[0]!r}, which the {split} "
                "split has. Leave out the rarest classes, or join them."
            )
        for example in examples:
            if kind == "proteins" and not PROTEIN_LETTERS.issuperset(example.text.upper()):
                raise ValueError(
                    f"{source}: {example.name} is no protein sequence, which has letters only. "
                    f"Received: {example.text[:40]!r}"
                )
        encode = ENCODERS.get(kind, str)
        texts = [encode(example.text) for example in examples]
        index = {name: number for number, name in enumerate(classes)}
        labels = np.array([index[example.label] for example in examples], "int32")
        parts[split] = Part(texts, labels)
    return Corpus(kind, source, classes, parts, texts_sha256(*columns_of(splits)))


def make_tokenizer(kind: str) -> Any:
    """Return the tokenizer of "proteins", "documents", "list_ops" or "pixels"."""
    from keras_performer.models import ByteTokenizer, ProteinTokenizer

    tokenizers = {
        "proteins": ProteinTokenizer,
        "documents": ByteTokenizer,
        "list_ops": list_ops.ListOpsTokenizer,
        "pixels": digits.PixelTokenizer,
    }
    return tokenizers[kind]()


def build_model(
    config: Config, corpus: Corpus, preset: str | None, backend: str | None
) -> "PerformerSequenceClassifier":
    """Choose the backend, seed it, and return the model; what takes strings has a preprocessor."""
    start_keras(backend, config.seed)
    from keras_performer.models import (
        PerformerEncoderBackbone,
        PerformerSequenceClassifier,
        PerformerSequenceClassifierPreprocessor,
    )

    tokenizer, preprocessor = make_tokenizer(corpus.kind), None
    if corpus.takes_strings:
        preprocessor = PerformerSequenceClassifierPreprocessor(
            tokenizer, sequence_length=config.data.sequence_length
        )
    encoder = build_backbone(
        PerformerEncoderBackbone,
        config.model,
        tokenizer.vocabulary_size(),
        tokenizer if corpus.takes_strings else None,
        config.data.sequence_length,
        preset,
        config.seed,
        config.training.precision,
    )
    return PerformerSequenceClassifier(
        encoder,
        num_classes=len(corpus.classes),
        preprocessor=preprocessor,
        pooling=config.head.pooling,
        dropout=config.head.dropout,
        hidden_dim=config.head.hidden_dim or None,
    )


def describe(
    config: Config,
    corpus: Corpus,
    model: "PerformerSequenceClassifier",
    preset: str | None,
    output: Path,
) -> Table:
    """Return a table of what the job is going to do."""
    training = config.training
    train, validation, test = (len(part.labels) for part in corpus.parts.values())
    passes = training.steps * training.batch_size / train
    rows = {
        corpus.kind: f"{corpus.source}: {train:,} to train on, {validation:,} to validate, "
        f"{test:,} to test, {len(corpus.classes)} classes",
        "input": f"at most {config.data.sequence_length:,} tokens",
        "model": f"{backbone_phrase(model.backbone, preset)}; {model.count_params():,} parameters",
        "training": f"{training.steps:,} steps of {training.batch_size} ({passes:.1f} passes), "
        f"AdamW, {training.precision}",
    }
    return run_table("Classification", rows, output)


def crop(row: np.ndarray, room: int, kind: str, rng: np.random.Generator | None) -> np.ndarray:
    """Return at most `room` tokens of a row; see the top of the file.

    **Args**
        row: Token ids without special tokens.
        room: The most that may stay.
        kind: "proteins", "documents", "list_ops" or "pixels".
        rng: Moves the window of a document; None takes its start.

    **Example**

    >>> crop(np.arange(9), 5, "proteins", None).tolist()
    [0, 1, 2, 7, 8]
    """
    if len(row) <= room:
        return row
    if kind == "proteins":
        last = room // 2
        return np.concatenate((row[: room - last], row[len(row) - last :]))
    start = rng.integers(len(row) - room + 1) if rng is not None and kind == "documents" else 0
    return row[start : start + room]


def input_maker(
    config: Config, corpus: Corpus, part: Part
) -> Callable[[np.ndarray, np.random.Generator | None], dict[str, np.ndarray]]:
    """Return a function of examples' indices and a generator that makes the model's inputs."""
    length, tokenizer = config.data.sequence_length, make_tokenizer(corpus.kind)

    def make_inputs(indices: np.ndarray, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        rows = [
            bracket(
                crop(tokenizer.tokenize(part.texts[i]), length - 2, corpus.kind, rng), tokenizer
            )
            for i in indices
        ]
        return pad_rows(rows, length, config.data.length_multiple)

    return make_inputs


def train(
    model: "PerformerSequenceClassifier",
    config: Config,
    corpus: Corpus,
    output: Path,
    console: Console,
) -> "tuple[keras.Model, dict[str, Any]]":
    """Train the model, or go on with a run that was killed.

    **Returns** A plain Keras model of the same layers, which takes token ids where the task itself
    takes strings; and what `loop.fit` returns.
    """
    import keras

    from training.data.batches import Batches
    from training.loop import fit

    training, data = config.training, config.data
    part, validation = corpus.parts["train"], corpus.parts["validation"]
    make_inputs = input_maker(config, corpus, part)
    batches = Batches(
        np.minimum(part.lengths(corpus.kind), data.sequence_length),
        lambda indices, rng: (make_inputs(indices, rng), part.labels[indices]),
        training.batch_size,
        training.steps_per_epoch,
        config.seed,
        data.bucket_batches,
    )
    scored = spread(len(validation.labels), training.validation_examples)
    trainer = keras.Model(model.input, model.output, name="trainer")
    record = fit(
        trainer,
        batches,
        (input_maker(config, corpus, validation)(scored, None), validation.labels[scored]),
        training,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        seed=config.seed,
        output=output,
        console=console,
    )
    return trainer, record


def compare(
    trainer: Any,
    corpus: Corpus,
    make_inputs: Callable[[np.ndarray, np.random.Generator | None], Any],
    batch_size: int,
) -> dict[str, Any]:
    """Score the model and the most frequent class on the test split.

    **Returns** For each: accuracy with its 95 % confidence interval, macro F1, Matthews
    correlation, and cross-entropy in nats (of the training split's class frequencies for the
    baseline). Then precision, recall, F1 and number of examples of each class.
    """
    test, num_classes = corpus.parts["test"], len(corpus.classes)
    logits = np.zeros((len(test.labels), num_classes))
    for indices, outputs in predict_in_batches(
        trainer, test.lengths(corpus.kind), lambda i: make_inputs(i, None), batch_size
    ):
        logits[indices] = outputs
    frequencies = log_frequencies(corpus.parts["train"].labels, num_classes)
    baseline = np.broadcast_to(frequencies, logits.shape)
    confusion = confusion_matrix(test.labels, logits.argmax(-1), num_classes)
    return {
        "examples": len(test.labels),
        "model": scores(logits, test.labels),
        "majority": scores(baseline, test.labels),
        "classes": class_rows(confusion, corpus.classes, "examples"),
    }


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Return the figures of logits (N, C) for labels (N,)."""
    confusion = confusion_matrix(labels, logits.argmax(-1), logits.shape[-1])
    hits = int(np.trace(confusion))
    return {
        "accuracy": hits / len(labels),
        "accuracy_interval": list(wilson_interval(hits, len(labels))),
        "macro_f1": macro_f1(confusion),
        "matthews": matthews_correlation(confusion),
        "cross_entropy": float(surprise(logits, labels).mean()),
    }


def comparison_table(result: dict[str, Any]) -> Table:
    """Return the figures of `compare` as a table."""
    table = Table(
        title=f"{result['examples']:,} examples of the test split",
        caption="Accuracy with its 95 % confidence interval",
    )
    for column in ("", "accuracy", "macro F1", "Matthews", "cross-entropy"):
        table.add_column(column, justify="right")
    for name, label in (("model", "model"), ("majority", "most frequent class")):
        row = result[name]
        low, high = row["accuracy_interval"]
        table.add_row(
            label,
            f"{row['accuracy']:.2%} ({low:.2%} to {high:.2%})",
            *(f"{row[key]:.4f}" for key in ("macro_f1", "matthews", "cross_entropy")),
        )
    return table


if __name__ == "__main__":
    main()
