"""Pretrain the encoder of a classifier on the inputs of its own task: `--help` names the flags.

The job reads the examples that `training.classification` reads, without their labels, trains a
`PerformerMaskedLM` to tell the tokens that were masked, compares it on the test split with the
frequencies of the tokens, saves a preset and loads it back. `training.classification --preset`
then trains on that encoder. Figures are in nats.

An example longer than `data.sequence_length` is cropped to a random window, a new one in each pass.

**Source** Amos, Berant and Gupta 2024 (arXiv 2310.02980), with the masked objective.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from training import classification
from training.backbones import backbone_phrase
from training.classification import Corpus, Part, make_tokenizer, read_corpus
from training.command import make_console, make_parser, prepare_output, start_keras, use_devices
from training.config import load_config
from training.masking import (
    compare,
    comparison_table,
    make_model,
    require_mask_rates,
    slice_batch,
    train,
    unigram_log_probabilities,
)
from training.results import finish, run_facts, run_table, save_preset, spread

if TYPE_CHECKING:
    from keras_performer.models import PerformerMaskedLM, PerformerMaskedLMPreprocessor

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.


@dataclasses.dataclass(frozen=True)
class DataConfig(classification.DataConfig):
    """Section `[data]` of a classification, and the rates of `masking.require_mask_rates`."""

    mask_rate: float = 0.15
    mask_token_rate: float = 1.0
    random_token_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_mask_rates(self)


@dataclasses.dataclass(frozen=True)
class Config(classification.Config):
    """The whole experiment. Any config of a classification will do; its `[head]` is not read."""

    data: DataConfig


class Rows(Sequence[np.ndarray]):
    """The token ids of a split's examples, each made when it is read: documents are long."""

    def __init__(self, part: Part, tokenizer: Any):
        self.part = part
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.part.labels)

    def __getitem__(self, index: Any) -> Any:
        """Return the token ids of an example, without special tokens."""
        return np.asarray(self.tokenizer.tokenize(self.part.texts[index]), "int32")


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
        if len(corpus.parts["test"].labels) < 2:
            raise ValueError(
                f"{corpus.source}: one example falls into the test split, and the standard error "
                "of the figures needs two. Pass more."
            )
        model, preprocessor = build_model(config, corpus, arguments.backend)
        output = prepare_output(arguments.output, config, corpus.sha256)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    console.print(describe(config, corpus, model, output))

    # 2. The examples that are scored get one fixed set of masks.
    from training.data.masked_batches import mask_sequences

    rows = {split: Rows(part, preprocessor.tokenizer) for split, part in corpus.parts.items()}
    chosen = spread(len(rows["validation"]), config.training.validation_examples)
    rng = np.random.default_rng(config.seed)
    validation_batch, test_batch = (
        mask_sequences(scored, preprocessor, rng, always_mask=True)
        for scored in ([rows["validation"][i] for i in chosen], rows["test"])
    )

    # 3. Train. A run that was killed goes on where its last epoch ended.
    lengths = corpus.parts["train"].lengths(corpus.kind)
    trainer, record = train(
        model, preprocessor, config, rows["train"], lengths, validation_batch, output, console
    )

    # 4. Compare with the frequencies of the tokens, at the same masked places.
    metrics: dict[str, Any] = {"parameters": model.count_params(), "training": record}
    baseline = unigram_log_probabilities(rows["train"], preprocessor.tokenizer)
    num_masked = int(test_batch[2].sum())
    metrics["test"] = {
        "examples": len(rows["test"]),
        "masked_tokens": num_masked,
        **compare(trainer, baseline, test_batch, config.training.batch_size),
    }
    title = f"{num_masked:,} masked tokens of {len(rows['test']):,} examples of the test split"
    console.print(comparison_table(metrics["test"], title, "examples"))

    # 5. Save the preset, and compare what was saved.
    x, _, _ = slice_batch(test_batch, 0, 4)
    _, largest = save_preset(model, x, config.training.precision, output, console)
    metrics["reload_max_abs_difference"] = largest

    counts = {f"{split}_examples": len(part) for split, part in rows.items()}
    seconds = time.perf_counter() - started
    metrics.update(run_facts(config, corpus.source, seconds, **counts))
    finish(output, metrics, console)
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser(
        "self_pretraining", "Pretrain the encoder of a classifier on the inputs of its own task."
    )
    parser.add_argument("--file", type=Path, help="as in training.classification")
    return parser.parse_args(argv)


def build_model(
    config: Config, corpus: Corpus, backend: str | None
) -> "tuple[PerformerMaskedLM, PerformerMaskedLMPreprocessor]":
    """Choose the backend, seed it, and return the untrained model and its preprocessor."""
    start_keras(backend, config.seed)
    return make_model(config, make_tokenizer(corpus.kind), takes_strings=corpus.takes_strings)


def describe(config: Config, corpus: Corpus, model: "PerformerMaskedLM", output: Path) -> Table:
    """Return a table of what the job is going to do."""
    training, data = config.training, config.data
    train, validation, test = (len(part.labels) for part in corpus.parts.values())
    passes = training.steps * training.batch_size / train
    rows = {
        corpus.kind: f"{corpus.source}: {train:,} to train on, {validation:,} to validate, "
        f"{test:,} to test",
        "input": f"at most {data.sequence_length:,} tokens, {data.mask_rate:.0%} of them masked",
        "model": f"{backbone_phrase(model.backbone, None)}; {model.count_params():,} parameters",
        "training": f"{training.steps:,} steps of {training.batch_size} ({passes:.1f} passes), "
        f"AdamW, {training.precision}",
    }
    return run_table("Self-pretraining", rows, output)


if __name__ == "__main__":
    main()
