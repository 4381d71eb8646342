"""Train a causal language model of text or proteins, score it, and let it write: see `--help`.

The job concatenates documents or proteins to long rows, trains a `PerformerCausalLM` to predict the
next token, compares it on held-out sequences with the frequencies of the tokens, saves a
keras-hub preset, loads it back, and generates from it.
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

from training.backbones import add_preset_flag, backbone_phrase, build_backbone, preset_facts
from training.command import make_console, make_parser, prepare_output, start_keras, use_devices
from training.config import load_config
from training.data.byte_pairs import SMALLEST_VOCABULARY, learn_byte_pairs
from training.data.copyleft_text import load_copyleft_text
from training.data.documents import TFDS, load_tfds
from training.data.examples import Splits, load_examples, texts_sha256
from training.data.packed_windows import PackedWindows
from training.data.protein_sources import SOURCES, load_proteins
from training.data.text import load_text
from training.results import finish, run_facts, run_table, save_preset, spread
from training.scores import mean_and_error
from training.sections import Experiment, ModelConfig, TrainingConfig, require

if TYPE_CHECKING:
    import keras

    from keras_performer.models import PerformerCausalLM

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

TEXTS = {"text": load_text, "copyleft_text": load_copyleft_text}
# What it writes at the end, and how much of the first test sequence it is given.
SAMPLE_TOKENS = 256
PROMPT_CHARACTERS = {"text": 64, "proteins": 8}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `[data]`.

    `vocabulary_size` = n reads text as n byte pairs, learned from the training documents; 0 reads
    it as bytes. Proteins have a token per residue. `text_field` is read for a user's JSONL or CSV
    file and TensorFlow Datasets.
    """

    source: str
    sequence_length: int
    heldout_share: float
    vocabulary_size: int = 0
    text_field: str = "text"

    def __post_init__(self) -> None:
        sources = (*TEXTS, *SOURCES)
        known = self.source in sources or self.source.startswith(TFDS)
        require(known, "data.source", f"one of {', '.join(sources)}, {TFDS}NAME")
        require(bool(self.text_field), "data.text_field", "the name of a field")
        require(self.sequence_length >= 16, "data.sequence_length", "at least 16")
        require(0 < self.heldout_share < 1, "data.heldout_share", "between 0 and 1")
        require(
            self.vocabulary_size == 0 or self.vocabulary_size >= SMALLEST_VOCABULARY,
            "data.vocabulary_size",
            f"0 (bytes), or at least {SMALLEST_VOCABULARY}",
        )


@dataclasses.dataclass(frozen=True)
class CausalLMTrainingConfig(TrainingConfig):
    """Section `[training]`, and how many windows are scored after each epoch."""

    validation_windows: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.validation_windows >= 1, "training.validation_windows", "at least 1")


@dataclasses.dataclass(frozen=True)
class Config(Experiment):
    """The whole experiment."""

    data: DataConfig
    model: ModelConfig
    training: CausalLMTrainingConfig


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Strings to train on and held-out ones, and what they are.

    **Args**
        kind: "text" or "proteins".
        source: A phrase that names the source.
        train: Documents or sequences.
        validation: Those scored after each epoch.
        test: Those scored at the end.
    """

    kind: str
    source: str
    train: list[str]
    validation: list[str]
    test: list[str]


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
        corpus = read_corpus(config, arguments.file, arguments.fasta)
        start = preset_facts(arguments.preset)
        digest = texts_sha256(
            corpus.train, corpus.validation, corpus.test, [start["preset_sha256"] or ""]
        )
        model, tokenizer = build_model(config, corpus, arguments.preset, arguments.backend)
        output = prepare_output(arguments.output, config, digest)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    windows = {
        split: pack(getattr(corpus, split), tokenizer, config)
        for split in ("train", "validation", "test")
    }
    console.print(describe(config, corpus, windows, model, arguments.preset, output))

    # 2. Train. A run that was killed goes on where its last epoch ended.
    trainer, record = train(model, config, windows, output, console)

    # 3. Compare with the frequencies of the tokens, at the same places.
    metrics: dict[str, Any] = {"parameters": model.count_params(), "training": record}
    baseline = unigram_log_probabilities(windows["train"], model.backbone.vocabulary_size)
    metrics["test"] = compare(trainer, baseline, windows["test"], config, corpus)
    console.print(comparison_table(metrics["test"]))

    # 4. Save the preset, and generate with what was saved.
    from training.distribution import num_replicas

    length = min(config.data.sequence_length, SAMPLE_TOKENS)
    prompt = corpus.test[0][: min(PROMPT_CHARACTERS[corpus.kind], length // 4)]
    token_ids = np.array([tokenizer.tokenize(corpus.test[0][:256])], "int32")
    token_ids = token_ids[:, : config.data.sequence_length]  # learned positions may end there
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    reloaded, largest = save_preset(model, x, config.training.precision, output, console)
    metrics["reload_max_abs_difference"] = largest
    reloaded.compile(sampler="top_p")
    # A row for each replica that a model divided among devices has; otherwise there is one.
    metrics["sample"] = reloaded.generate([prompt] * num_replicas(), max_length=length)[0]
    console.print(f"What it writes after {prompt!r}:")
    console.print(metrics["sample"])

    seconds, num_tokens = time.perf_counter() - started, windows["train"].num_tokens
    metrics.update(run_facts(config, corpus.source, seconds, train_tokens=num_tokens))
    metrics.update(start)
    finish(output, metrics, console)
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser("causal_lm", "Train a causal language model of text or proteins.")
    parser.add_argument(
        "--file", type=Path,
        help="your own documents in place of data.source: a text file, a folder of .txt files, or "
        "JSONL or CSV with the field data.text_field; gzip or not",
    )  # fmt: skip
    parser.add_argument(
        "--fasta", type=Path, help="your own proteins, plain or gzip, in place of data.source"
    )
    add_preset_flag(parser, "the decoder of this preset, with its tokens")
    return parser.parse_args(argv)


def read_corpus(config: Config, file: Path | None, fasta: Path | None) -> Corpus:
    """Read the strings of the config's source, or a user's own."""
    if file is not None and fasta is not None:
        raise ValueError("Pass --file for documents or --fasta for proteins, not both.")
    splits = None if fasta is not None else read_documents(config.data, file)
    if splits is not None:
        texts = {split: [example.text for example in part] for split, part in splits.items()}
        corpus = Corpus("text", config.data.source if file is None else str(file), **texts)
    else:
        train, heldout, source = load_proteins(config.data.source, config.data.heldout_share, fasta)
        sequences = [protein.sequence for protein in heldout]
        half = len(sequences) // 2
        corpus = Corpus(
            "proteins",
            source,
            [protein.sequence for protein in train],
            sequences[:half],
            sequences[half:],
        )
    needed = config.data.sequence_length * config.training.batch_size
    if sum(map(len, corpus.train)) < needed:
        raise ValueError(
            f"{corpus.source}: {sum(map(len, corpus.train)):,} characters are left to train on, "
            f"fewer than one batch of {needed:,} tokens. Lower data.sequence_length or "
            "training.batch_size, or pass more."
        )
    return corpus


def read_documents(data: DataConfig, file: Path | None) -> Splits | None:
    """Read a user's documents, or those of a source; None if it has proteins."""
    if file is not None:
        return load_examples(file, data.text_field)
    if data.source.startswith(TFDS):
        return load_tfds(data.source.removeprefix(TFDS), data.text_field, label_field=None)
    return TEXTS[data.source]() if data.source in TEXTS else None


def build_model(
    config: Config, corpus: Corpus, preset: str | None, backend: str | None
) -> "tuple[PerformerCausalLM, Any]":
    """Choose the backend, seed it, and return the model to train and its tokenizer."""
    start_keras(backend, config.seed)

    from keras_performer.models import (
        ByteTokenizer,
        PerformerBytePairTokenizer,
        PerformerCausalLM,
        PerformerCausalLMPreprocessor,
        PerformerDecoderBackbone,
        ProteinTokenizer,
    )

    if preset is not None:
        tokenizer = PerformerCausalLMPreprocessor.from_preset(preset).tokenizer
        if isinstance(tokenizer, ProteinTokenizer) != (corpus.kind == "proteins"):
            raise ValueError(
                f"The data are {corpus.kind}, which the preset's {type(tokenizer).__name__} does "
                f"not read. Choose another preset. Received: {preset}"
            )
    elif corpus.kind == "proteins":
        if config.data.vocabulary_size:
            raise ValueError(
                "Proteins have a token per residue: 'data.vocabulary_size' must be 0. Received: "
                f"{config.data.vocabulary_size}"
            )
        tokenizer = ProteinTokenizer()
    elif config.data.vocabulary_size:
        pairs = learn_byte_pairs(corpus.train, config.data.vocabulary_size)
        tokenizer = PerformerBytePairTokenizer(*pairs)
    else:
        tokenizer = ByteTokenizer()
    backbone = build_backbone(
        PerformerDecoderBackbone,
        config.model,
        tokenizer.vocabulary_size(),
        None,  # with a preset it is that one's own
        config.data.sequence_length,
        preset,
        config.seed,
        config.training.precision,
    )
    preprocessor = PerformerCausalLMPreprocessor(
        tokenizer, sequence_length=config.data.sequence_length
    )
    return PerformerCausalLM(backbone, preprocessor), tokenizer


def pack(texts: Sequence[str], tokenizer: Any, config: Config) -> PackedWindows:
    """Tokenize strings, with a start and an end token each, and pack them into windows."""
    start, end = tokenizer.start_token_id, tokenizer.end_token_id
    sequences = [np.array([start, *tokenizer.tokenize(text), end], "int32") for text in texts]
    return PackedWindows(sequences, config.data.sequence_length, tokenizer.pad_token_id)


def describe(
    config: Config,
    corpus: Corpus,
    windows: dict[str, PackedWindows],
    model: "PerformerCausalLM",
    preset: str | None,
    output: Path,
) -> Table:
    """Return a table of what the job is going to do."""
    training = config.training
    tokens = training.steps * training.batch_size * config.data.sequence_length
    passes = tokens / windows["train"].num_tokens
    rows = {
        corpus.kind: f"{corpus.source}: {len(corpus.train):,} to train on "
        f"({windows['train'].num_tokens:,} tokens), {len(corpus.validation):,} and "
        f"{len(corpus.test):,} held out",
        "input": f"windows of {config.data.sequence_length:,} tokens",
        "model": f"{backbone_phrase(model.backbone, preset)}; {model.count_params():,} parameters",
        "training": f"{training.steps:,} steps of {training.batch_size} windows ({tokens:,} "
        f"tokens, {passes:.1f} passes), AdamW, {training.precision}",
    }
    return run_table("Causal language model", rows, output)


def train(
    model: "PerformerCausalLM",
    config: Config,
    windows: dict[str, PackedWindows],
    output: Path,
    console: Console,
) -> "tuple[keras.Model, dict[str, Any]]":
    """Train the model, or go on with a run that was killed.

    **Returns** A plain Keras model of the same layers, which takes packed windows; and what
    `loop.fit` returns.
    """
    import keras

    from training.data.batches import Batches
    from training.loop import fit, objective_of_tokens

    training = config.training
    packed = model.backbone.packed()
    logits = model.backbone.token_embedding(packed.output, reverse=True)
    trainer = keras.Model(packed.input, logits, name="trainer")
    batches = Batches(
        np.full(len(windows["train"]), config.data.sequence_length),
        windows["train"].read,
        training.batch_size,
        training.steps_per_epoch,
        config.seed,
    )
    scored = spread(len(windows["validation"]), training.validation_windows)
    record = fit(
        trainer,
        batches,
        windows["validation"].read(scored),
        training,
        **objective_of_tokens(),
        seed=config.seed,
        output=output,
        console=console,
    )
    return trainer, record


def unigram_log_probabilities(windows: PackedWindows, vocabulary_size: int) -> np.ndarray:
    """Return the log frequency (vocabulary,) of every predicted token, one added to each count."""
    counts = np.ones(vocabulary_size)
    for _, (_, y, weights) in windows.batches(64):
        counts += np.bincount(y[weights > 0], minlength=vocabulary_size)
    return np.log(counts / counts.sum())


def compare(
    trainer: "keras.Model",
    baseline: np.ndarray,
    windows: PackedWindows,
    config: Config,
    corpus: Corpus,
) -> dict[str, Any]:
    """Score the model and the baseline on every token of the held-out sequences.

    **Returns** For each: cross-entropy in nats a token, perplexity and accuracy over all predicted
    tokens, and for text bits per byte (end tokens are predicted, and their cost is counted). Then
    the difference of the mean cross-entropy of each sequence, baseline minus model: its mean over
    sequences, and the standard error of that mean, None for one sequence.
    """
    texts = corpus.test
    totals = {name: np.zeros(len(texts)) for name in ("model", "unigram")}
    hits = dict.fromkeys(totals, 0.0)
    counts = np.zeros(len(texts))
    for indices, (x, y, weights) in windows.batches(config.training.batch_size):
        logits = np.asarray(trainer.predict_on_batch(x), "float32")
        peak = logits.max(-1, keepdims=True)
        normalizer = peak[..., 0] + np.log(np.exp(logits - peak).sum(-1, dtype="float64"))
        owners = np.stack([windows.sequences_of(index) for index in indices])
        kept = weights > 0
        np.add.at(counts, owners[kept], 1)
        surprise = normalizer - np.take_along_axis(logits, y[..., None], -1)[..., 0]
        np.add.at(totals["model"], owners[kept], surprise[kept])
        np.add.at(totals["unigram"], owners[kept], -baseline[y[kept]])
        hits["model"] += float((logits.argmax(-1) == y)[kept].sum())
        hits["unigram"] += float((y[kept] == baseline.argmax()).sum())

    num_tokens = counts.sum()
    result: dict[str, Any] = {"sequences": len(texts), "tokens": int(num_tokens)}
    for name, total in totals.items():
        cross_entropy = float(total.sum() / num_tokens)
        result[name] = {
            "cross_entropy": cross_entropy,
            "perplexity": float(np.exp(cross_entropy)),
            "accuracy": hits[name] / float(num_tokens),
        }
        if corpus.kind == "text":
            num_bytes = sum(len(text.encode()) for text in texts)
            result[name]["bits_per_byte"] = float(total.sum() / np.log(2) / num_bytes)
    differences = (totals["unigram"] - totals["model"]) / np.maximum(counts, 1)
    result["difference"] = mean_and_error(differences)
    return result


def comparison_table(result: dict[str, Any]) -> Table:
    """Return the figures of `compare` as a table."""
    mean, error = (result["difference"][key] for key in ("mean", "standard_error"))
    columns = {
        "cross_entropy": "cross-entropy",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
        "accuracy": "accuracy",
    }
    columns = {key: title for key, title in columns.items() if key in result["model"]}
    table = Table(
        title=f"{result['tokens']:,} tokens of {result['sequences']:,} held-out sequences",
        caption="Cross-entropy below the unigram baseline's, mean over sequences: "
        + (f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"),
    )
    for column in ("", *columns.values()):
        table.add_column(column, justify="right")
    for name, label in (("model", "model"), ("unigram", "unigram frequencies")):
        table.add_row(label, *(f"{result[name][key]:.4f}" for key in columns))
    return table


if __name__ == "__main__":
    main()
