"""Train a protein masked language model, measure it, and export it: `--help` names the flags.

The job reads proteins, trains a `PerformerMaskedLM` to predict masked residues, compares it on
held-out proteins with the frequencies of the residues, saves a preset, loads it back, and exports
it. Figures are in nats.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from training.config import load_config
from training.data.fasta import Protein, read_fasta
from training.data.protein_packages import load_metastudent, load_mmseqs2_examples
from training.data.protein_sample import load_protein_sample

if TYPE_CHECKING:
    import keras

    from keras_performer.models import PerformerMaskedLM, PerformerMaskedLMPreprocessor

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "protein_masked_lm.toml"
DEFAULT_OUTPUT = Path("runs") / "protein_masked_lm"
# Beyond this, a reloaded or exported model is not the model that was trained.
RELOAD_TOLERANCE = 1e-5
EXPORT_TOLERANCE = 1e-3
# What `data.source` may name beside "sample", which has a held-out part of its own.
PACKAGES: dict[str, Callable[[], list[Protein]]] = {
    "mmseqs2_examples": load_mmseqs2_examples,
    "metastudent": load_metastudent,
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `[data]`."""

    source: str
    sequence_length: int
    mask_rate: float
    mask_token_rate: float
    random_token_rate: float
    heldout_share: float

    def __post_init__(self) -> None:
        sources = ("sample", *PACKAGES)
        _require(self.source in sources, "data.source", f"one of {', '.join(sources)}")
        _require(self.sequence_length >= 16, "data.sequence_length", "at least 16")
        _require(0 < self.mask_rate < 1, "data.mask_rate", "between 0 and 1")
        _require(0 <= self.mask_token_rate <= 1, "data.mask_token_rate", "between 0 and 1")
        _require(
            0 <= self.random_token_rate <= 1 - self.mask_token_rate,
            "data.random_token_rate",
            "at least 0, and at most 1 with data.mask_token_rate",
        )
        _require(0 < self.heldout_share < 1, "data.heldout_share", "between 0 and 1")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Section `[model]`: arguments of `PerformerEncoderBackbone`, which checks them."""

    num_layers: int
    num_heads: int
    hidden_dim: int
    intermediate_dim: int
    num_features: int
    dropout: float


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Section `[training]`."""

    steps: int
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    beta_2: float
    weight_decay: float
    clip_norm: float
    validation_proteins: int
    precision: str

    def __post_init__(self) -> None:
        for name in ("steps", "steps_per_epoch", "batch_size", "validation_proteins"):
            _require(getattr(self, name) >= 1, f"training.{name}", "at least 1")
        _require(
            self.steps % self.steps_per_epoch == 0,
            "training.steps",
            f"a multiple of training.steps_per_epoch ({self.steps_per_epoch})",
        )
        _require(
            0 <= self.warmup_steps < self.steps,
            "training.warmup_steps",
            f"at least 0 and below training.steps ({self.steps})",
        )
        for name in ("learning_rate", "clip_norm"):
            _require(getattr(self, name) > 0, f"training.{name}", "above 0")
        _require(0 < self.beta_2 < 1, "training.beta_2", "between 0 and 1")
        _require(self.weight_decay >= 0, "training.weight_decay", "at least 0")
        _require(
            self.precision in ("float32", "mixed_bfloat16"),
            "training.precision",
            "'float32' or 'mixed_bfloat16'",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole experiment."""

    seed: int
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32")


def _require(condition: bool, key: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{key!r} must be {what}.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the job.

    **Args**
        argv: Command-line arguments. Default: those of the process.

    **Returns** What `metrics.json` holds.

    **Raises** SystemExit, with one sentence, if the arguments or the data are not fit to be used.
    """
    started = time.perf_counter()
    console = Console()
    arguments = parse_arguments(argv)

    # 1. Everything that can be wrong is found before anything is compiled.
    try:
        config = load_config(Config, arguments.config, arguments.set)
        train, heldout, source = read_proteins(arguments.fasta, config)
        output = prepare_output(arguments.output, config, [train, heldout])
        model, preprocessor = build_model(config, arguments.backend)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    console.print(describe(config, source, train, heldout, model, output))

    # 2. Residues become token ids once; the held-out proteins get one fixed set of masks.
    from training.data.masked_batches import mask_proteins

    train_ids = tokenize(train, preprocessor.tokenizer)
    heldout_ids = tokenize(heldout, preprocessor.tokenizer)
    heldout_batch = mask_proteins(
        heldout_ids, preprocessor, np.random.default_rng(config.seed), always_mask=True
    )

    # 3. Train. A run that was killed goes on where its last epoch ended.
    trainer = fit(model, preprocessor, config, train_ids, heldout_batch, output, console)

    # 4. Compare with the frequencies of the residues, at the same masked places.
    metrics: dict[str, Any] = {"parameters": model.count_params()}
    baseline = unigram_log_probabilities(train_ids, preprocessor.tokenizer)
    metrics["heldout"] = compare(trainer, baseline, heldout_batch, config.training.batch_size)
    console.print(comparison_table(metrics["heldout"]))

    # 5. Save the preset, and use what was saved from here on.
    from keras_performer.models import PerformerMaskedLM

    preset = output / "preset"
    model.save_to_preset(str(preset))
    reloaded = PerformerMaskedLM.from_preset(str(preset))
    x, y, weights = slice_batch(heldout_batch, 0, 4)
    logits = predict(reloaded, x)
    largest = difference("the reloaded preset", predict(model, x), logits, RELOAD_TOLERANCE)
    metrics["reload_max_abs_difference"] = largest
    console.print(f"Preset: {preset}; loaded back, its logits differ by at most {largest:.1e}.")
    places = x["mask_positions"][0][weights[0] > 0]
    console.print(prediction_table(heldout[0], preprocessor.tokenizer, places, y[0], logits[0]))

    # 6. Export in float32, and run each exported file.
    if config.training.precision != "float32":
        reloaded = PerformerMaskedLM.from_preset(str(preset), dtype="float32")
        logits = predict(reloaded, x)
    metrics["export_max_abs_difference"] = export_all(reloaded, output, x, logits, console)

    metrics.update(run_facts(config, source, train, heldout, time.perf_counter() - started))
    write_json(output / "metrics.json", metrics)
    shutil.rmtree(output / "backup", ignore_errors=True)
    console.print(f"Finished in {metrics['seconds']:.0f} s. Figures: {output / 'metrics.json'}")
    return metrics


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.protein_masked_lm",
        description="Train a protein masked language model.",
    )
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="TOML file of the experiment"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="replace one key of the config, such as training.steps=1000; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--fasta", type=Path, help="your own proteins, plain or gzip, in place of data.source"
    )
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), help="Keras backend")
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help=f"folder (default: {DEFAULT_OUTPUT})"
    )
    return parser.parse_args(argv)


def read_proteins(fasta: Path | None, config: Config) -> tuple[list[Protein], list[Protein], str]:
    """Return the training proteins, the held-out proteins, and a phrase that names the source.

    The sample comes divided. Elsewhere identical sequences count once, and the hash of a sequence
    decides its part.
    """
    if fasta is None and config.data.source == "sample":
        train, heldout = load_protein_sample()
        source = "the shipped sample"
    else:
        source = config.data.source if fasta is None else str(fasta)
        records = PACKAGES[source]() if fasta is None else read_fasta(fasta)
        first: dict[str, Protein] = {}
        for record in records:
            first.setdefault(record.sequence, record)
        distinct = list(first.values())
        if all(set("ACGTUN").issuperset(sequence) for sequence in first):
            raise ValueError(
                f"{source}: all sequences are made of A, C, G, T, U and N, so they look like DNA "
                "or RNA. Pass protein sequences."
            )
        for protein in distinct:
            if set(protein.sequence) == {"J"}:  # Not in the vocabulary: nothing to predict.
                raise ValueError(f"{source}: {protein.name!r} is made of J only. Remove it.")
        bar = config.data.heldout_share * 2**64
        train = [protein for protein in distinct if sequence_hash(protein) >= bar]
        heldout = [protein for protein in distinct if sequence_hash(protein) < bar]
        source = f"{source} ({len(records):,} records, {len(distinct):,} distinct)"
    if len(heldout) < 2:
        raise ValueError(
            f"{source}: {len(heldout)} protein(s) would be held out, and 2 or more are needed. "
            "Raise data.heldout_share, or pass more proteins."
        )
    if len(train) < config.training.batch_size:
        raise ValueError(
            f"{source}: {len(train)} protein(s) are left to train on, fewer than one batch of "
            f"{config.training.batch_size}. Lower training.batch_size, or pass more proteins."
        )
    return train, heldout, source


def sequence_hash(protein: Protein) -> int:
    """Return a number below 2**64 that depends on the sequence only."""
    return int.from_bytes(hashlib.sha256(protein.sequence.encode()).digest()[:8], "big")


def prepare_output(output: Path, config: Config, proteins: list[list[Protein]]) -> Path:
    """Make the folder, check that it can be written, and that it holds no other unfinished run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"The output folder cannot be written: {error}. Pass --output.") from error
    digest = hashlib.sha256()
    for protein in (protein for part in proteins for protein in (*part, None)):
        digest.update(b"\n" if protein is None else protein.sequence.encode() + b"\n")
    run = {"config": dataclasses.asdict(config), "sequences_sha256": digest.hexdigest()}
    record = output / "run.json"
    if (output / "backup").is_dir() and json.loads(record.read_text(encoding="utf-8")) != run:
        raise ValueError(
            f"{output} holds an unfinished run with another config or other proteins ({record}). "
            "Repeat its command to finish it, pass another --output, or delete "
            f"{output / 'backup'}."
        )
    write_json(record, run)
    (output / "metrics.json").unlink(missing_ok=True)
    return output


def build_model(
    config: Config, backend: str | None
) -> "tuple[PerformerMaskedLM, PerformerMaskedLMPreprocessor]":
    """Choose the backend, seed it, and return the untrained model and its preprocessor."""
    # TensorFlow's start-up messages; what goes wrong is still raised.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    try:
        import keras
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Keras cannot start its backend: {error}. Install it, or choose another one with "
            "--backend."
        ) from error

    from keras_performer.models import (
        PerformerEncoderBackbone,
        PerformerMaskedLM,
        PerformerMaskedLMPreprocessor,
        ProteinTokenizer,
    )

    if backend not in (None, keras.config.backend()):
        raise ValueError(
            f"Keras already runs on {keras.config.backend()} in this process, so --backend "
            f"{backend} comes too late."
        )
    keras.utils.set_random_seed(config.seed)
    tokenizer = ProteinTokenizer()
    backbone = PerformerEncoderBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        **dataclasses.asdict(config.model),
        seed=config.seed,
        dtype=config.training.precision,
    )
    preprocessor = PerformerMaskedLMPreprocessor(
        tokenizer,
        sequence_length=config.data.sequence_length,
        mask_selection_rate=config.data.mask_rate,
        mask_token_rate=config.data.mask_token_rate,
        random_token_rate=config.data.random_token_rate,
    )
    return PerformerMaskedLM(backbone, preprocessor=preprocessor), preprocessor


def describe(
    config: Config,
    source: str,
    train: Sequence[Protein],
    heldout: Sequence[Protein],
    model: "PerformerMaskedLM",
    output: Path,
) -> Table:
    """Return a table of what the job is going to do."""
    import keras

    training, data, shape = config.training, config.data, config.model
    passes = training.steps * training.batch_size / len(train)
    residues = sum(len(protein.sequence) for protein in train)
    rows = {
        "proteins": f"{source}: {len(train):,} to train on ({residues:,} residues), "
        f"{len(heldout):,} held out",
        "input": f"{data.sequence_length} tokens, {data.mask_rate:.0%} of the residues masked",
        "model": f"{shape.num_layers} layers of width {shape.hidden_dim}, {shape.num_heads} heads "
        f"with {shape.num_features} features, {model.count_params():,} parameters",
        "training": f"{training.steps:,} steps of {training.batch_size} proteins ({passes:.1f} "
        f"passes), AdamW, {training.precision}",
        "backend": f"keras {keras.version()} on {keras.config.backend()}",
        "output": f"{output}" + (" (resumes a run)" if (output / "backup").is_dir() else ""),
    }
    table = Table(title="Protein masked language model", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def tokenize(proteins: Sequence[Protein], tokenizer: Any) -> list[np.ndarray]:
    """Return the token ids of each protein, without special tokens."""
    return [np.asarray(tokenizer.tokenize(protein.sequence), "int32") for protein in proteins]


def fit(
    model: "PerformerMaskedLM",
    preprocessor: "PerformerMaskedLMPreprocessor",
    config: Config,
    train_ids: Sequence[np.ndarray],
    heldout_batch: Any,
    output: Path,
    console: Console,
) -> "keras.Model":
    """Train the model, or go on with a run that was killed.

    **Returns** A plain Keras model of the same layers, which takes masked batches where the task
    itself takes strings.
    """
    import keras

    from training.data.masked_batches import MaskedBatches

    training = config.training
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if training.warmup_steps else training.learning_rate,
        decay_steps=training.steps - training.warmup_steps,
        alpha=0.05,
        warmup_target=training.learning_rate if training.warmup_steps else None,
        warmup_steps=training.warmup_steps,
    )
    optimizer = keras.optimizers.AdamW(
        schedule,  # pyright: ignore[reportArgumentType]  Keras takes a schedule too.
        beta_2=training.beta_2,
        weight_decay=training.weight_decay,
        global_clipnorm=training.clip_norm,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale"])
    trainer = keras.Model(model.input, model.output, name="trainer")
    trainer.compile(
        optimizer,
        # The mean over masked residues; the default would count the unused places too.
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
    )
    batches = MaskedBatches(
        train_ids,
        preprocessor,
        batch_size=training.batch_size,
        steps_per_epoch=training.steps_per_epoch,
        seed=config.seed,
    )
    callbacks = [
        # Kept until the whole job is done, so that a kill after training costs no training.
        keras.callbacks.BackupAndRestore(
            str(output / "backup"), double_checkpoint=True, delete_checkpoint=False
        ),
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: setattr(batches, "epoch", epoch)
        ),
    ]
    if importlib.util.find_spec("tensorflow") is None:
        console.print("No TensorBoard log: Keras needs TensorFlow to write it.")
    else:
        log_dir = str(output / "tensorboard")
        callbacks.append(keras.callbacks.TensorBoard(log_dir, write_graph=False))
    trainer.fit(
        batches,
        shuffle=False,  # The walk is shuffled; Keras would shuffle its steps, and not repeatably.
        epochs=training.steps // training.steps_per_epoch,
        validation_data=slice_batch(heldout_batch, 0, training.validation_proteins),
        validation_batch_size=training.batch_size,
        callbacks=callbacks,
        verbose=1 if console.is_terminal else 2,  # pyright: ignore[reportArgumentType]
    )
    return trainer


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Return the proteins from `start` to `stop` of a batch."""
    x, y, weights = batch
    part = slice(start, stop)
    return {name: array[part] for name, array in x.items()}, y[part], weights[part]


def predict(model: "keras.Model", x: dict[str, np.ndarray]) -> np.ndarray:
    """Return the logits (B, P, vocabulary) of one batch of masked inputs as float32."""
    import keras

    logits = model(x, training=False)
    return np.asarray(keras.ops.convert_to_numpy(logits), "float32")


def unigram_log_probabilities(proteins: Sequence[np.ndarray], tokenizer: Any) -> np.ndarray:
    """Return the log frequency of every residue in the proteins, with one added to each count.

    **Returns** A vector over the vocabulary; minus infinity at special tokens, never predicted.
    """
    counts = np.zeros(tokenizer.vocabulary_size())
    for protein in proteins:
        counts += np.bincount(protein, minlength=len(counts))
    counts += 1
    counts[list(tokenizer.special_token_ids)] = 0
    with np.errstate(divide="ignore"):
        return np.log(counts / counts.sum())


def compare(
    trainer: "keras.Model", baseline: np.ndarray, heldout_batch: Any, batch_size: int
) -> dict[str, Any]:
    """Score the model and the baseline at the masked places of the held-out proteins.

    **Returns** For each: cross-entropy, its exponential (perplexity) and accuracy over all masked
    residues. Then the difference of the mean cross-entropy of each protein, baseline minus model:
    its mean over proteins, the standard error of that mean, and their ratio.
    """
    scores: dict[str, list[np.ndarray]] = {"model": [], "unigram": []}
    hits = {"model": 0.0, "unigram": 0.0}
    num_proteins = len(heldout_batch[1])
    for start in range(0, num_proteins, batch_size):
        x, y, weights = slice_batch(heldout_batch, start, start + batch_size)
        logits = np.asarray(trainer.predict_on_batch(x), "float64")
        peak = logits.max(-1, keepdims=True)
        log_probabilities = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
        for name, table in (("model", log_probabilities), ("unigram", baseline[None, None])):
            table = np.broadcast_to(table, log_probabilities.shape)
            surprise = -np.take_along_axis(table, y[..., None], -1)[..., 0]
            scores[name].append(np.where(weights > 0, surprise, 0.0))
            hits[name] += float(((table.argmax(-1) == y) * weights).sum())

    places = heldout_batch[2].sum(-1)
    result: dict[str, Any] = {"proteins": num_proteins, "masked_residues": int(places.sum())}
    per_protein = {}
    for name, parts in scores.items():
        totals = np.concatenate(parts).sum(-1)
        per_protein[name] = totals / places
        cross_entropy = float(totals.sum() / places.sum())
        result[name] = {
            "cross_entropy": cross_entropy,
            "perplexity": float(np.exp(cross_entropy)),
            "accuracy": hits[name] / float(places.sum()),
        }
    differences = per_protein["unigram"] - per_protein["model"]
    error = float(differences.std(ddof=1) / np.sqrt(num_proteins))
    result["difference"] = {
        "mean": float(differences.mean()),
        "standard_error": error,
        "standard_errors": float(differences.mean() / error),
    }
    return result


def comparison_table(result: dict[str, Any]) -> Table:
    """Return the figures of `compare` as a table."""
    difference = result["difference"]
    table = Table(
        title=f"{result['masked_residues']:,} masked residues of {result['proteins']:,} held-out "
        "proteins",
        caption=f"Cross-entropy below the unigram baseline's, mean over proteins: "
        f"{difference['mean']:.4f} ± {difference['standard_error']:.4f} "
        f"({difference['standard_errors']:.1f} standard errors)",
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


def prediction_table(
    protein: Protein, tokenizer: Any, places: np.ndarray, labels: np.ndarray, logits: np.ndarray
) -> Table:
    """Return true and predicted residues at the first masked places of one protein."""
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
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

    **Returns** The largest absolute difference of the logits by format; None if not written, which
    is so where TensorFlow is not installed.
    """
    from keras_performer import export

    results: dict[str, float | None] = {}
    for format, name, run in (
        ("tf_saved_model", "saved_model", run_saved_model),
        ("litert", "model.tflite", run_litert),
    ):
        try:
            path = export(model, output / name, format=format)
        except ImportError as reason:
            results[format] = None
            console.print(f"No {format}: {reason}")
            continue
        results[format] = difference(str(path), expected, run(path, x), EXPORT_TOLERANCE)
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


def difference(what: str, expected: np.ndarray, received: np.ndarray, tolerance: float) -> float:
    """Return the largest absolute difference, or raise RuntimeError if it exceeds `tolerance`."""
    largest = float(np.abs(expected - received).max())
    if not largest <= tolerance:
        raise RuntimeError(
            f"The outputs of {what} differ from the trained model's by {largest:.2e}, more than "
            f"{tolerance:.0e}."
        )
    return largest


def run_facts(
    config: Config,
    source: str,
    train: Sequence[Protein],
    heldout: Sequence[Protein],
    seconds: float,
) -> dict[str, Any]:
    """Return what identifies the run."""
    import keras

    return {
        "seconds": seconds,
        "backend": keras.config.backend(),
        "keras": keras.version(),
        "source": source,
        "train_proteins": len(train),
        "heldout_proteins": len(heldout),
        "config": dataclasses.asdict(config),
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
