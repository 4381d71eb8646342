"""Train what a preset needs, and say of a run what its card says."""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from training.backbones import preset_facts
from training.config import config_of, load_config
from training.results import is_finished
from zoo.build._record import Metric, Point

CONFIGS = Path("training") / "configs"


def run(
    recipe: ModuleType, config: str, name: str, *overrides: str, preset: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Run a recipe, or go on with a run that was killed; one that was finished is not repeated.

    **Args**
        recipe: A module of `training`.
        config: Name of the TOML file in `training/configs`.
        name: Of the run's folder in `runs`.
        *overrides: Of keys of the config, "key=value" each.
        preset: Name or folder of the preset to train on, if the recipe takes one.

    **Returns** The figures of the run, and its folder.
    """
    path, output = CONFIGS / config, Path("runs") / name
    metrics = output / "metrics.json"
    if is_finished(output):
        finished = json.loads(metrics.read_text(encoding="utf-8"))
        # As a config, because a key that is newer than the run has its default there.
        made_with = config_of(recipe.Config, finished["config"], str(metrics))
        # By its weights, because a preset that was made again has its name still.
        start = preset_facts(preset)["preset_sha256"]
        wanted = load_config(recipe.Config, path, overrides), start
        if (made_with, finished.get("preset_sha256")) == wanted:
            return finished, output
    arguments = [f"--set={override}" for override in overrides]
    arguments += [f"--preset={preset}"] if preset else []
    return recipe.main([f"--config={path}", f"--output={output}", *arguments]), output


def parse_arguments(name: str, argv: Sequence[str] | None) -> bool:
    """Return whether the command line of a build says `--without-twin`."""
    parser = argparse.ArgumentParser(description=f"Build {name}.")
    parser.add_argument("--without-twin", action="store_true", help="do not train the softmax twin")
    return parser.parse_args(argv).without_twin


def run_with_twin(
    recipe: ModuleType,
    config: str,
    name: str,
    argv: Sequence[str] | None,
    twin_overrides: Sequence[str] = ("model.attention=softmax",),
    twin_phrase: str = 'the same config with `attention = "softmax"`: same tokens, steps and '
    "parameters but for the random features.",
    start: Callable[..., tuple[dict[str, Any], Path]] | None = None,
) -> tuple[dict[str, Any], Path, dict[str, Any] | None, str]:
    """Run a recipe for a preset, and once more with softmax attention unless told not to.

    **Args**
        recipe: As in `run`.
        config: As in `run`.
        name: Of the preset and the run's folder; the twin's folder ends with `_softmax`.
        argv: Command-line arguments. With `--without-twin` the twin is not trained.
        twin_overrides: Of keys of the config, for the twin.
        twin_phrase: What a card says of the twin.
        start: Runs what the run goes on from, and returns what `run` does. It is called with the
            end of the folder's name ("" or "_softmax") and the overrides.

    **Returns** The figures of the run, its folder, the figures of the twin (None: it is not
    trained), and what the card says of it.
    """
    without_twin = parse_arguments(name, argv)

    def train(end: str, *overrides: str) -> tuple[dict[str, Any], Path]:
        preset = str(start(end, *overrides)[1] / "preset") if start else None
        return run(recipe, config, f"{name}{end}", *overrides, preset=preset)

    model, output = train("")
    if without_twin:
        return model, output, None, unfinished(model, f"{name}_softmax")
    twin, _ = train("_softmax", *twin_overrides)
    return model, output, twin, twin_phrase


def facts(metrics: dict[str, Any], mean_tokens: float) -> dict[str, Any]:
    """Return the fields of a `Record` that follow from the run.

    **Args**
        metrics: The figures of the run.
        mean_tokens: Mean number of tokens in a training example, padding not counted.
    """
    training, history = metrics["config"]["training"], metrics["training"]["history"]
    steps = len(history) * training["steps_per_epoch"]  # fewer than planned if patience ended it
    # `seconds` is what the last process took, which may have gone on with the run of another.
    around = metrics["seconds"] - metrics["training"]["fit_seconds"]
    return {
        "config": metrics["config"],
        "hardware": metrics["machine"],
        "backend": f"Keras {metrics['keras']} on {metrics['backend']}",
        "wall_seconds": sum(row["seconds"] for row in history) + around,
        "steps": steps,
        "tokens_seen": round(steps * training["batch_size"] * mean_tokens),
        "curve": [
            Point((i + 1) * training["steps_per_epoch"], row["loss"], row["val_loss"])
            for i, row in enumerate(history)
        ],
    }


def in_turn(facts_of_parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the `facts` of runs that went on from one another, by the names of their configs."""
    parts = list(facts_of_parts.values())
    curve, steps = [], 0
    for part in parts:
        curve += [Point(steps + p.step, p.loss, p.val_loss) for p in part["curve"]]
        steps += part["steps"]
    return {
        **parts[-1],
        **{key: sum(part[key] for part in parts) for key in ("wall_seconds", "tokens_seen")},
        "config": {name: part["config"] for name, part in facts_of_parts.items()},
        "steps": steps,
        "curve": curve,
    }


def figures(
    rows: Iterable[tuple[str, Any, str, int]],
    baseline: str,
    model: dict[str, Any],
    twin: dict[str, Any] | None,
    split: str = "test",
) -> list[Metric]:
    """Return figures on held-out data.

    **Args**
        rows: Of each its name, "lower" or "higher", its key in the figures of a run, and a factor.
        baseline: The key of the run's figures without a model.
        model: The figures of the run.
        twin: Those of the softmax twin's run; None: there is none.
        split: What the runs call the held-out data.
    """
    ours, theirs = model[split], twin and twin[split]
    return [
        Metric(
            name,
            better,
            scale * ours["model"][key],
            scale * theirs["model"][key] if theirs else None,
            scale * ours[baseline][key],
        )
        for name, better, key, scale in rows
    ]


def unfinished(model: dict[str, Any], name: str) -> str:
    """Return what a card can say of a softmax twin that is not, or not fully, trained.

    **Args**
        model: The figures of the finished run.
        name: Of the folder of the twin's run in `runs`.
    """
    folder = Path("runs") / name
    history = folder / "history.jsonl"
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
    if not lines:
        return "not trained yet."
    ours, theirs = model["training"]["history"], [json.loads(line) for line in lines]
    training = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]["training"]
    # Patience may have ended ours earlier.
    epochs = min(len(ours), len(theirs))
    rows = [history[epochs - 1] for history in (theirs, ours)]
    losses = [f"{row['val_loss']:.4f} (accuracy {row['val_accuracy']:.1%})" for row in rows]
    return (
        f"the same model with softmax attention made {len(theirs) * training['steps_per_epoch']:,} "
        f"of {training['steps']:,} steps. After {epochs * training['steps_per_epoch']:,} its loss "
        f"on the validation split was {losses[0]}, and this model's {losses[1]}."
    )
