"""Train a protein masked language model, measure it, and export it: `--help` names the flags.

The job reads proteins, trains a `PerformerMaskedLM` to predict masked residues, compares it on
held-out proteins with the frequencies of the residues, saves a preset, loads it back, and exports
it. Figures are in nats.
"""

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.command import make_console, make_parser, prepare_output, start_keras, use_devices
from training.config import load_config
from training.data.examples import texts_sha256
from training.data.fasta import Protein
from training.data.protein_sources import SOURCES, load_proteins
from training.masking import (
    compare,
    comparison_table,
    make_model,
    require_mask_rates,
    slice_batch,
    train,
    unigram_log_probabilities,
)
from training.results import difference, finish, logits_of, run_facts, run_table, save_preset
from training.scores import log_probabilities
from training.sections import (
    Experiment,
    ModelConfig,
    TrainingConfig,
    require,
    require_batch,
    require_buckets,
)

if TYPE_CHECKING:
    from keras_performer.models import PerformerMaskedLM, PerformerMaskedLMPreprocessor

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "protein_masked_lm.toml"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `[data]`."""

    source: str
    sequence_length: int
    mask_rate: float
    mask_token_rate: float
    random_token_rate: float
    heldout_share: float
    length_multiple: int = 0
    bucket_batches: int = 1

    def __post_init__(self) -> None:
        require(self.source in SOURCES, "data.source", f"one of {', '.join(SOURCES)}")
        require(self.sequence_length >= 16, "data.sequence_length", "at least 16")
        require_mask_rates(self)
        require(0 < self.heldout_share < 1, "data.heldout_share", "between 0 and 1")
        require_buckets(self)


@dataclasses.dataclass(frozen=True)
class MaskedLMTrainingConfig(TrainingConfig):
    """Section `[training]`, and how many held-out proteins are scored after each epoch.

    With `patience`, which chooses weights by them, they do not count in the figures at the end.
    """

    validation_proteins: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.validation_proteins >= 1, "training.validation_proteins", "at least 1")


@dataclasses.dataclass(frozen=True)
class Config(Experiment):
    """The whole experiment."""

    data: DataConfig
    model: ModelConfig
    training: MaskedLMTrainingConfig


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
        proteins, heldout, source = read_proteins(arguments.fasta, config)
        check_enough(config, heldout)
        model, preprocessor = build_model(config, arguments.backend)
        output = prepare_output(arguments.output, config, sequences_sha256(proteins, heldout))
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    console.print(describe(config, source, proteins, heldout, model, output))

    # 2. Residues become token ids once; the held-out proteins get one fixed set of masks.
    from training.data.masked_batches import mask_sequences

    train_ids = tokenize(proteins, preprocessor.tokenizer)
    heldout_ids = tokenize(heldout, preprocessor.tokenizer)
    heldout_batch = mask_sequences(
        heldout_ids, preprocessor, np.random.default_rng(config.seed), always_mask=True
    )

    # 3. Train. A run that was killed goes on where its last epoch ended.
    lengths = np.array([len(ids) for ids in train_ids])
    validation = slice_batch(heldout_batch, 0, config.training.validation_proteins)
    trainer, record = train(
        model, preprocessor, config, train_ids, lengths, validation, output, console
    )

    # 4. Compare with the frequencies of the residues, at the same masked places.
    metrics: dict[str, Any] = {"parameters": model.count_params(), "training": record}
    baseline = unigram_log_probabilities(train_ids, preprocessor.tokenizer)
    scored = slice_batch(heldout_batch, first_scored(config), len(heldout))
    num_proteins, num_masked = len(scored[1]), int(scored[2].sum())
    metrics["heldout"] = {
        "proteins": num_proteins,
        "masked_residues": num_masked,
        **compare(trainer, baseline, scored, config.training.batch_size),
    }
    title = f"{num_masked:,} masked residues of {num_proteins:,} held-out proteins"
    console.print(comparison_table(metrics["heldout"], title, "proteins"))

    # 5. Save the preset, and use what was saved from here on.
    x, y, weights = slice_batch(heldout_batch, 0, 4)
    reloaded, largest = save_preset(model, x, config.training.precision, output, console)
    metrics["reload_max_abs_difference"] = largest
    logits = logits_of(reloaded, x)
    places = x["mask_positions"][0][weights[0] > 0]
    console.print(prediction_table(heldout[0], preprocessor.tokenizer, places, y[0], logits[0]))

    # 6. Export in float32, and run each exported file.
    if config.training.precision != "float32":
        reloaded = type(model).from_preset(str(output / "preset"), dtype="float32")
        logits = logits_of(reloaded, x)
    metrics["export_max_abs_difference"] = export_all(reloaded, output, x, logits, console)

    counts = {"train_proteins": len(proteins), "heldout_proteins": len(heldout)}
    metrics.update(run_facts(config, source, time.perf_counter() - started, **counts))
    finish(output, metrics, console)
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser(
        "protein_masked_lm", "Train a protein masked language model.", DEFAULT_CONFIG
    )
    parser.add_argument(
        "--fasta", type=Path, help="your own proteins, plain or gzip, in place of data.source"
    )
    return parser.parse_args(argv)


def read_proteins(fasta: Path | None, config: Config) -> tuple[list[Protein], list[Protein], str]:
    """Return the training proteins, the held-out ones, and a phrase that names the source."""
    proteins, heldout, source = load_proteins(config.data.source, config.data.heldout_share, fasta)
    require_batch(source, len(proteins), "protein(s)", config.training.batch_size)
    return proteins, heldout, source


def first_scored(config: Config) -> int:
    """Return from which held-out protein on the figures are: patience chose weights on the others.

    Without patience all count.
    """
    return config.training.validation_proteins if config.training.patience else 0


def check_enough(config: Config, heldout: Sequence[Protein]) -> None:
    """Raise ValueError unless two proteins are left to score, which a standard error needs."""
    left = len(heldout) - first_scored(config)
    if left < 2:
        raise ValueError(
            f"{max(left, 0)} of {len(heldout)} held-out proteins are left to score, and 2 or more "
            "are needed: patience chooses weights on the first "
            f"{config.training.validation_proteins}. Lower training.validation_proteins, or set "
            "training.patience to 0."
        )


def sequences_sha256(*parts: Sequence[Protein]) -> str:
    """Return a digest of the sequences in each part, in order."""
    return texts_sha256(*([protein.sequence for protein in part] for part in parts))


def build_model(
    config: Config, backend: str | None
) -> "tuple[PerformerMaskedLM, PerformerMaskedLMPreprocessor]":
    """Choose the backend, seed it, and return the untrained model and its preprocessor."""
    start_keras(backend, config.seed)
    from keras_performer.models import ProteinTokenizer

    return make_model(config, ProteinTokenizer())


def describe(
    config: Config,
    source: str,
    train: Sequence[Protein],
    heldout: Sequence[Protein],
    model: "PerformerMaskedLM",
    output: Path,
) -> Table:
    """Return a table of what the job is going to do."""
    training, data, shape = config.training, config.data, config.model
    passes = training.steps * training.batch_size / len(train)
    residues = sum(len(protein.sequence) for protein in train)
    rows = {
        "proteins": f"{source}: {len(train):,} to train on ({residues:,} residues), "
        f"{len(heldout):,} held out",
        "input": f"{data.sequence_length} tokens, {data.mask_rate:.0%} of the residues masked",
        "model": f"{shape.num_layers} layers of width {shape.hidden_dim}, {shape.num_heads} heads "
        f"({shape.attention}, {shape.num_features} features), {model.count_params():,} parameters",
        "training": f"{training.steps:,} steps of {training.batch_size} proteins ({passes:.1f} "
        f"passes), AdamW, {training.precision}",
    }
    return run_table("Protein masked language model", rows, output)


def tokenize(proteins: Sequence[Protein], tokenizer: Any) -> list[np.ndarray]:
    """Return the token ids of each protein, without special tokens."""
    return [np.asarray(tokenizer.tokenize(protein.sequence), "int32") for protein in proteins]


def prediction_table(
    protein: Protein, tokenizer: Any, places: np.ndarray, labels: np.ndarray, logits: np.ndarray
) -> Table:
    """Return true and predicted residues at the first masked places of one protein."""
    probabilities = np.exp(log_probabilities(logits))
    table = Table(title=f"Masked residues of {protein.name}, {len(protein.sequence)} residues")
    for column in ("place", "true", "probability", "predicted", "probability"):
        table.add_column(column, justify="right")
    for i, place in enumerate(places[:10]):
        true, best = int(labels[i]), int(probabilities[i].argmax())
        table.add_row(
            str(place),
            tokenizer.id_to_token(true),
            f"{probabilities[i, true]:.3f}",
            tokenizer.id_to_token(best),
            f"{probabilities[i, best]:.3f}",
        )
    return table


def export_all(
    model: "PerformerMaskedLM",
    output: Path,
    x: dict[str, np.ndarray],
    expected: np.ndarray,
    console: Console,
) -> dict[str, float | None]:
    """Export to SavedModel and LiteRT, and compare their logits for x with `expected`.

    **Returns** The largest absolute difference of the logits by format; None if it could not be
    written, which is so where TensorFlow is not installed.
    """
    from keras_performer import export

    results: dict[str, float | None] = {}
    for format, name, run in (
        ("tf_saved_model", "saved_model", run_saved_model),
        ("litert", "model.tflite", run_litert),
    ):
        try:
            path = export(model, output / name, format=format)
        except (ImportError, ValueError) as reason:
            results[format] = None
            console.print(f"No {format}: {reason}")
            continue
        results[format] = difference(expected, run(path, x))
        console.print(f"Exported {path}: its logits differ by at most {results[format]:.1e}.")
    return results


def run_saved_model(path: Path, x: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits of an exported SavedModel."""
    import tensorflow as tf

    module = tf.saved_model.load(str(path))
    return module.serve(x)["logits"].numpy()


def run_litert(path: Path, x: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits of an exported LiteRT file."""
    if importlib.util.find_spec("ai_edge_litert") is not None:
        from ai_edge_litert.interpreter import Interpreter
    else:
        import tensorflow as tf

        Interpreter = tf.lite.Interpreter  # a lazy module: it cannot be imported from
    return Interpreter(model_path=str(path)).get_signature_runner("serve")(**x)["logits"]


if __name__ == "__main__":
    main()
