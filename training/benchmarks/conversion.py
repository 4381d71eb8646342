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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.progress import Progress
from rich.table import Table

from keras_performer.convert import performerize
from keras_performer.feature_maps import FavorPlus
from training.command import make_console
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
    tuned,
)
from training.data.antibodies import load_antibodies

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


# AntiBERTy has 45 times the parameters.
PLANS = {
    "sapiens-heavy": Plan(),
    "sapiens-light": Plan(),
    "antiberty": Plan(num_heldout=100, calibration_steps=20, tuning_steps=40, rate=5e-5),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, write the file, and return what metrics.json holds."""
    parser = argparse.ArgumentParser(description="Accuracy of converted models on antibodies.")
    parser.add_argument("--models", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--windows", nargs="+", type=int, help="exact windows; default: 16 4")
    parser.add_argument("--quick", action="store_true", help="one window, few sequences and steps")
    parser.add_argument("--out", type=Path, default=Path("runs") / "conversion")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out must name a folder. Received: {arguments.out}, which is a file")
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = make_console()
    results: dict[str, Any] = {"backend": keras.config.backend(), "models": {}}
    for name in arguments.models:
        plan = PLANS[name]
        if arguments.windows:
            plan = dataclasses.replace(plan, windows=tuple(arguments.windows))
        if arguments.quick:
            plan = quick(plan)
        rows: list[dict[str, Any]] = []
        results["models"][name] = {"plan": dataclasses.asdict(plan), "rows": rows}
        try:
            model, heldout, train = prepare(name, plan)
        except (ImportError, OSError, ValueError) as error:
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


def prepare(name: str, plan: Plan) -> tuple[Any, Masked, Masked]:
    """Load a model, and mask the antibodies it is scored on and those it is trained on.

    Raises:
        OSError or ValueError: The model or the antibodies cannot be had. The message says what to
            do.
        ImportError: There is no PyTorch, which reads the model.
    """
    model = load_model(name)
    tokenizer = model.preprocessor.tokenizer
    model.preprocessor = None  # the tokens are ready
    parts = load_antibodies(MODELS[name].chain)
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

    def calibrate(name: str, student: Any, part: str) -> float:
        return calibrated(
            student,
            model,
            train,
            part,
            rate=plan.map_rate if part == "feature_maps" else plan.rate,
            steps=plan.calibration_steps,
            batch_size=plan.batch_size,
            progress=progress,
            label=f"{name}: calibrating {part}",
        )

    def tune(name: str, converted: Any) -> float:
        return tuned(
            converted,
            train,
            rate=plan.rate,
            steps=plan.tuning_steps,
            batch_size=plan.batch_size,
            progress=progress,
            label=f"{name}: tuning",
        )

    measure(ORIGINAL, model)
    exact = performerize(model, feature_map=None)
    measure(f"{ORIGINAL}, tuned", exact, tune(ORIGINAL, exact))
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
                        seconds[i] += calibrate(name, student, part)
                elif stage == "tuned":
                    seconds[i] += tune(name, student)
                twins = {
                    "minus_twin": f"{names[0]}, {stage}",
                    "minus_converted_twin": f"{names[0]}, converted",
                }
                measure(f"{name}, {stage}", student, seconds[i], **(twins if i else {}))


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
