"""Choose the shape of a small encoder: `python -m zoo.build.ablation --backend torch`.

Each variant of `secondary_structure.toml` trains for the same time, with a learning rate that ends
with it, and names the states of the same residues of the validation split. Speed counts as much as
what a step teaches, so run it with nothing else on the cores it has. zoo/README.md keeps the table.
A variant that was finished is not repeated, unless it was measured with other settings.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from training import residue_labels as recipe
from training.command import make_console, start_keras, write_json
from training.config import load_config
from zoo.build._runs import CONFIGS

CONFIG = CONFIGS / "secondary_structure.toml"
OUTPUT = Path("runs") / "ablation"
# What each variant changes.
VARIANTS: dict[str, tuple[str, ...]] = {
    "as in the config": (),
    "another seed": ("seed=2",),
    "no exact window": ("model.exact_window=0",),
    "no exact window, 256 features": ("model.exact_window=0", "model.num_features=256"),
    "no exact window, favor_plus_plus": (
        "model.exact_window=0",
        "model.feature_map=favor_plus_plus",
    ),
    "64 features": ("model.num_features=64",),
    "exact window 64": ("model.exact_window=64",),
    "far bias -4": ("model.far_bias=-4",),
    "no qk_norm": ("model.qk_norm=false",),
    "8 layers": ("model.num_layers=8",),
    "width 256": ("model.hidden_dim=256", "model.intermediate_dim=1024", "model.num_heads=4"),
    "sliding window only": ("model.attention=sliding_window", "model.sliding_window=64"),
    "softmax attention": ("model.attention=softmax",),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description="Compare small encoders at equal time.")
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"))
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of a variant")
    arguments = parser.parse_args(argv)
    console = make_console()
    config = load_config(recipe.Config, CONFIG)
    start_keras(arguments.backend, config.seed)
    import keras

    rows = []
    for number, (name, overrides) in enumerate(VARIANTS.items()):
        # What the figures depend on; they are measured again if any of it is another.
        settings = {
            "name": name,
            "overrides": list(overrides),
            "minutes": arguments.minutes,
            "backend": keras.config.backend(),
            "config": dataclasses.asdict(config),
        }
        finished = OUTPUT / f"{number}.json"
        row = json.loads(finished.read_text(encoding="utf-8")) if finished.is_file() else {}
        if row.get("settings") != settings:
            console.print(name)
            row = {"settings": settings, **measure(overrides, arguments, console)}
            write_json(finished, row)
        rows.append(row)
    print(markdown(rows))


def measure(
    overrides: Sequence[str], arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Return the figures of one variant."""
    # A short run tells how many steps the time allows.
    _, history = run([*overrides, *schedule(40, 20)], arguments.backend, console)
    seconds = history[-1]["training_seconds"] / 20
    steps = max(4, round(60 * arguments.minutes / seconds / 4) * 4)
    model, history = run([*overrides, *schedule(steps, steps // 4)], arguments.backend, console)
    return {
        "parameters": model.count_params(),
        "steps": steps,
        "minutes": sum(row["training_seconds"] for row in history) / 60,
        "loss": history[-1]["val_loss"],
        "accuracy": history[-1]["val_accuracy"],
    }


def schedule(steps: int, steps_per_epoch: int) -> list[str]:
    """Return the overrides for a run of so many steps, a tenth of them warm-up."""
    return [
        f"training.steps={steps}",
        f"training.steps_per_epoch={steps_per_epoch}",
        f"training.warmup_steps={steps // 10}",
    ]


def run(
    overrides: Sequence[str], backend: str | None, console: Console
) -> tuple[Any, list[dict[str, float]]]:
    """Train one model, and return it with the figures of each epoch."""
    config = load_config(recipe.Config, CONFIG, overrides)
    splits, source = recipe.read_splits(config, None)
    parts = {
        split: recipe.read_chains(examples, config.data.states, source)
        for split, examples in splits.items()
    }
    shutil.rmtree(OUTPUT / "run", ignore_errors=True)  # of a variant that was not finished
    (OUTPUT / "run").mkdir(parents=True)
    model = recipe.build_model(config, None, backend)
    _, record = recipe.train(model, config, parts, OUTPUT / "run", console)
    return model, record["history"]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of the variants."""
    lines = [
        "| variant | parameters | steps | minutes | nats a residue | Q8 in % |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['settings']['name']} | {row['parameters']:,} | {row['steps']:,} "
        f"| {row['minutes']:.1f} | {row['loss']:.3f} | {100 * row['accuracy']:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
