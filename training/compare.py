"""Train one config with several kinds of attention, and compare them: `--help` names the flags.

Each attention gets the same data, tokens, weights and steps. First a training step is timed, and
its memory measured, over lengths; then the recipe runs once for each attention, each in a process
of its own. The command can be repeated after a kill: what is finished is not done again, and a run
goes on after its last epoch. It writes `comparison.json`, `comparison.md` and `comparison.png`.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from training.command import make_console, make_parser, start_keras, write_json
from training.config import load_config
from training.results import is_finished, peak_bytes
from training.sections import ATTENTIONS
from training.timing import VOCABULARY, interleaved, token_model, token_step

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe's `metrics.json` calls its results, and what it trains.

    **Args**
        split: Where the figures on held-out data are.
        baseline: The name, in there, of the figures without a model.
        figures: Those that are compared, the main one first, as far as the run has them.
        backbone: The class in `keras_performer.models`.
    """

    split: str
    baseline: str
    figures: tuple[str, ...]
    backbone: str = "PerformerEncoderBackbone"


RECIPES = {
    "protein_masked_lm": Recipe("heldout", "unigram", ("perplexity", "accuracy")),
    "self_pretraining": Recipe("test", "unigram", ("perplexity", "accuracy")),
    "causal_lm": Recipe(
        "test",
        "unigram",
        ("bits_per_byte", "perplexity", "accuracy"),
        "PerformerDecoderBackbone",
    ),
    "classification": Recipe("test", "majority", ("accuracy", "macro_f1", "matthews")),
    "residue_labels": Recipe("test", "majority", ("q8", "q3", "cross_entropy")),
}
LOWER_IS_BETTER = ("bits_per_byte", "perplexity", "cross_entropy")
# Timings of a training step to take the median of.
ROUNDS = 3
# A step of so many tokens makes what every step needs: weights, the optimizer, compiled code.
WARM_UP_LENGTH = 16


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the comparison.

    **Args**
        argv: Command-line arguments. Default: those of the process.

    **Returns** What `comparison.json` holds.

    **Raises** SystemExit, with one sentence, if the arguments are not fit to be used, or if a run
    ends with an error.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments, extra = parse_arguments(argv)

    # 1. Everything that can be wrong is found before anything is compiled.
    try:
        configs = load_configs(arguments, extra)
        lengths = check_lengths(arguments.lengths, configs)
        if arguments.part:
            return run_part(arguments, extra, configs, lengths)
        output = prepare_folder(arguments, extra, configs)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")

    # 2. Time and memory of a training step, which also shows that every model can be built.
    attentions = list(configs)
    cost = read_json(output / "cost.json")
    if not cost or (cost["attentions"], cost["lengths"]) != (attentions, lengths):
        cost = {
            "attentions": attentions,
            "lengths": lengths,
            "seconds": run_in_child(argv, "time"),
            "peak_bytes": {name: run_in_child(argv, "memory", name) for name in attentions},
        }
        write_json(output / "cost.json", cost)

    # 3. Train. A run that is finished is not repeated, and one that was killed goes on.
    for attention in attentions:
        if not is_finished(output / attention):
            run_in_child(argv, "train", attention)

    # 4. One table, one plot.
    try:
        results = summarize(arguments.recipe, configs, output, cost)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_json(output / "comparison.json", results)
    titles, rows = table_rows(results)
    (output / "comparison.md").write_text(markdown(results, titles, rows), encoding="utf-8")
    draw(results).savefig(output / "comparison.png", dpi=100)
    console = make_console()
    console.print(rich_table(results, titles, rows))
    console.print(f"Wrote comparison.json, comparison.md and comparison.png to {output}.")
    return results


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the parsed command line, and the flags that are for the recipe."""
    parser = make_parser("compare", "Train one config with several kinds of attention.")
    parser.allow_abbrev = False  # A short form could stand for a flag of the recipe.
    parser.epilog = "Further flags, such as --fasta or --file, go to the recipe."
    parser.add_argument("--recipe", required=True, choices=RECIPES, help="what the config is for")
    parser.add_argument(
        "--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS),
        help="what is compared (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", nargs="+", type=int,
        help="lengths at which a training step of one sequence is measured (default: a quarter, "
        "half and all of data.sequence_length)",
    )  # fmt: skip
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)  # what a child process does
    return parser.parse_known_args(argv)


def load_configs(arguments: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """Return the recipe's config for each attention, after a look at every argument."""
    for override in arguments.set:
        if override.partition("=")[0].strip() == "model.attention":
            raise ValueError(
                "The comparison sets model.attention itself: name what it compares with "
                f"--attentions. Received: --set {override}"
            )
    recipe = importlib.import_module(f"training.{arguments.recipe}")
    parsed = recipe.parse_arguments([*recipe_arguments(arguments, ""), *extra])
    if getattr(parsed, "preset", None) is not None:
        raise ValueError(
            "A preset has the attention that it was trained with, so there is nothing to compare: "
            f"leave out --preset. Received: {parsed.preset}"
        )
    for path in (getattr(parsed, "fasta", None), getattr(parsed, "file", None)):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file.")
    return {
        attention: load_config(
            recipe.Config, arguments.config, [*arguments.set, f"model.attention={attention}"]
        )
        for attention in dict.fromkeys(arguments.attentions)
    }


def recipe_arguments(arguments: argparse.Namespace, attention: str) -> list[str]:
    """Return the command line of a recipe's run."""
    overrides = [*arguments.set, f"model.attention={attention}"]
    shared = {"--backend": arguments.backend, "--distribution": arguments.distribution}
    return [
        f"--config={arguments.config}",
        f"--output={arguments.output / attention}",
        *(f"--set={override}" for override in overrides),
        *(f"{flag}={value}" for flag, value in shared.items() if value is not None),
    ]


def check_lengths(lengths: Sequence[int] | None, configs: dict[str, Any]) -> list[int]:
    """Return the lengths to measure, ascending."""
    longest = next(iter(configs.values())).data.sequence_length
    lengths = [longest // 4, longest // 2, longest] if lengths is None else lengths
    if min(lengths) < 1:
        raise ValueError(f"--lengths must be above 0. Received: {min(lengths)}")
    return sorted(set(lengths))


def prepare_folder(
    arguments: argparse.Namespace, extra: Sequence[str], configs: dict[str, Any]
) -> Path:
    """Make the output folder, and check that it holds no runs of another comparison.

    Attentions and lengths may be others than those that it began with.
    """
    output = arguments.output
    config = dataclasses.asdict(next(iter(configs.values())))
    config["model"].pop("attention")
    run = {"recipe": arguments.recipe, "backend": arguments.backend, "config": config}
    run |= {"distribution": arguments.distribution, "arguments": list(extra)}
    record = output / "run.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if read_json(record) != run:
            if any((output / name / "run.json").is_file() for name in ATTENTIONS):
                raise ValueError(
                    f"{output} holds runs with another config or other arguments ({record}). Pass "
                    "another --output, or delete the folder."
                )
            (output / "cost.json").unlink(missing_ok=True)
        write_json(record, run)
    except OSError as error:
        raise ValueError(f"The output folder cannot be written: {error}. Pass --output.") from error
    return output


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_in_child(argv: Sequence[str], *part: str) -> Any:
    """Do a part of the comparison in a process of its own.

    **Returns** What the part measured; None for a run of the recipe, which writes files.

    **Raises** SystemExit if it failed; it has told why.
    """
    command = [sys.executable, "-m", "training.compare", *argv, "--part", *part]
    measures = part[0] != "train"
    # The child waits for the end of its input, which is the end of this process.
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE if measures else None, text=True
    ) as child:
        printed = child.stdout.read() if child.stdout else ""
        code = child.wait()
    if code:
        killed = f"error: {' '.join(part)}: the process was ended by signal {-code}."
        sys.exit(code if code > 0 else killed)
    return json.loads(printed.splitlines()[-1]) if measures else None


def run_part(
    arguments: argparse.Namespace,
    extra: Sequence[str],
    configs: dict[str, Any],
    lengths: Sequence[int],
) -> Any:
    """Do what `run_in_child` was asked for, and return what it found."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    part, *names = arguments.part
    if part == "train":
        recipe = importlib.import_module(f"training.{arguments.recipe}")
        return recipe.main([*recipe_arguments(arguments, names[0]), *extra])
    start_keras(arguments.backend, next(iter(configs.values())).seed)
    backbone = RECIPES[arguments.recipe].backbone
    if part == "time":
        measured = step_seconds(configs, backbone, lengths)
    else:
        measured = step_bytes(configs[names[0]], backbone, lengths)
    print(json.dumps(measured))
    return measured


def _end_with_parent() -> None:
    """End this process when its input ends, so that no orphan writes into a folder."""
    # Not `sys.stdin`, whose lock Python takes when it ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def step_model(config: Any, backbone_name: str) -> Any:
    """Return a compiled model of the config's shape that predicts its own tokens."""
    from keras_performer import models

    backbone = getattr(models, backbone_name)(
        vocabulary_size=VOCABULARY,
        **config.model.arguments(),
        seed=config.seed,
        dtype=config.training.precision,
    )
    return token_model(backbone, "adamw")


def step_seconds(
    configs: dict[str, Any], backbone: str, lengths: Sequence[int]
) -> dict[str, list[float]]:
    """Return the seconds of a training step at each length, by attention; they take turns."""
    models = {name: step_model(config, backbone) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for length in lengths:
        runs = {
            name: functools.partial(token_step, model, length) for name, model in models.items()
        }
        for name, found in interleaved(runs, ROUNDS).items():
            seconds[name].append(found)
    return seconds


def step_bytes(config: Any, backbone: str, lengths: Sequence[int]) -> list[int] | None:
    """Return what a training step at each length adds to the most memory of this process.

    None where the system does not tell it. A step's peak is only seen if it is higher than those
    before, so lengths ascend.
    """
    if sys.platform != "linux":
        return None
    model = step_model(config, backbone)
    token_step(model, WARM_UP_LENGTH)
    before = peak_bytes()
    added = []
    for length in lengths:
        token_step(model, length)
        added.append(peak_bytes() - before)
    return added


def summarize(
    recipe_name: str, configs: dict[str, Any], output: Path, cost: dict[str, Any]
) -> dict[str, Any]:
    """Return what `comparison.json` holds, from the files of every run.

    **Raises** ValueError if the runs had other data or other backends, so that they tell nothing
    of the attention.
    """
    recipe = RECIPES[recipe_name]
    metrics = {name: read_json(output / name / "metrics.json") for name in configs}
    records = {name: read_json(output / name / "run.json") for name in configs}
    for what, values in (
        ("data", {record["data_sha256"] for record in records.values()}),
        ("backends", {run["backend"] for run in metrics.values()}),
    ):
        if len(values) > 1:
            raise ValueError(
                f"The runs in {output} had different {what}, so they cannot be compared: delete "
                "those that are to be repeated."
            )
    first = next(iter(metrics.values()))
    known = first[recipe.split]["model"]
    figures = [name for name in recipe.figures if name in known]
    by_accuracy = figures[0] not in LOWER_IS_BETTER
    curve = "val_accuracy" if by_accuracy else "val_loss"
    config = {**first["config"], "model": {**first["config"]["model"], "attention": None}}
    return {
        "recipe": recipe_name,
        "backend": first["backend"],
        "source": first["source"],
        "headline": {"figure": figures[0], "better": "higher" if by_accuracy else "lower"},
        "curve": curve,
        "runs": {
            name: summarize_run(run, configs[name], recipe.split, figures, curve)
            for name, run in metrics.items()
        },
        "baseline_name": recipe.baseline,
        "baseline": {name: first[recipe.split][recipe.baseline][name] for name in figures},
        "step": cost,
        "config": config,
    }


def summarize_run(
    metrics: dict[str, Any], config: Any, split: str, figures: Sequence[str], curve: str
) -> dict[str, Any]:
    """Return the figures of one run.

    `seconds` are those of its epochs, validation included, without what a kill undid; a step's are
    the median over epochs, the first of which compiles and does not count if there are more.
    """
    training, history = config.training, metrics["training"]["history"]
    steps = len(history) * training.steps_per_epoch
    by_epoch = [row["training_seconds"] / training.steps_per_epoch for row in history]
    ends = np.cumsum([row["seconds"] for row in history]).tolist()
    return {
        **{name: metrics[split]["model"][name] for name in figures},
        "parameters": metrics["parameters"],
        "steps": steps,
        "tokens": steps * training.batch_size * config.data.sequence_length,
        "seconds": ends[-1],
        "seconds_per_step": statistics.median(by_epoch[1:] or by_epoch),
        "peak_bytes": metrics["training"]["peak_bytes"],
        "curve": [[end, row[curve]] for end, row in zip(ends, history, strict=True)],
    }


def table_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the table's columns, and the cells of its rows."""
    runs, baseline = results["runs"].values(), results["baseline"]
    rows = [
        [
            figure.replace("_", " "),
            *(f"{run[figure]:.4f}" for run in runs),
            f"{baseline[figure]:.4f}",
        ]
        for figure in baseline
    ]
    peaks = [run["peak_bytes"] for run in runs]
    rows += [
        ["parameters", *(f"{run['parameters']:,}" for run in runs), ""],
        # Where batches end with their longest example there are fewer.
        ["tokens, at most", *(f"{run['tokens']:,}" for run in runs), ""],
        ["seconds", *(f"{run['seconds']:,.1f}" for run in runs), ""],
        ["seconds a step", *(f"{run['seconds_per_step']:.4f}" for run in runs), ""],
        ["peak memory", *("" if n is None else f"{n / 2**20:,.0f} MiB" for n in peaks), ""],
    ]
    return ["", *results["runs"], results["baseline_name"]], rows


def notes(results: dict[str, Any]) -> str:
    """Return what the table's figures mean."""
    headline = results["headline"]
    return (
        f"{headline['figure'].replace('_', ' ').capitalize()}: {headline['better']} is better. "
        "Parameters include random features, which are not trained; tokens include padding; "
        "seconds are those of training and validation; memory is the process's main memory."
    )


def rich_table(results: dict[str, Any], titles: Sequence[str], rows: list[list[str]]) -> Table:
    """Return the table for the screen."""
    table = Table(title=title_of(results), caption=notes(results))
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def title_of(results: dict[str, Any]) -> str:
    """Return a phrase that names the comparison."""
    return f"{results['recipe']} on {results['source']}, {results['backend']}"


def markdown(results: dict[str, Any], titles: Sequence[str], rows: list[list[str]]) -> str:
    """Return the table of runs, and the cost of a step over lengths, as Markdown."""
    cost = results["step"]
    step_titles = ["attention", *(f"{length:,} tokens" for length in cost["lengths"])]
    step_rows = []
    for name in cost["attentions"]:
        cells = [f"{seconds:.4f} s" for seconds in cost["seconds"][name]]
        added = cost["peak_bytes"][name]
        if added is not None:
            pairs = zip(cells, added, strict=True)
            cells = [f"{cell}, {count / 2**20:,.0f} MiB" for cell, count in pairs]
        step_rows.append([name, *cells])
    parts = [
        f"# {title_of(results)}",
        markdown_table(titles, rows),
        notes(results),
        "A training step on one sequence: its time, and the memory that it adds.",
        markdown_table(step_titles, step_rows),
        "![Quality over time, time and memory over length](comparison.png)",
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, with numbers to the right."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, rule, *rows))


def draw(results: dict[str, Any]) -> Figure:
    """Draw quality over time, and time and memory of a step over length."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    quality, time, memory = figure.subplots(1, 3)
    cost = results["step"]
    for name, run in results["runs"].items():
        color = f"C{ATTENTIONS.index(name)}"
        quality.plot(*zip(*run["curve"], strict=True), ".-", color=color, label=name)
        time.plot(cost["lengths"], cost["seconds"][name], ".-", color=color, label=name)
        if cost["peak_bytes"][name] is not None:
            mebibytes = [count / 2**20 for count in cost["peak_bytes"][name]]
            memory.plot(cost["lengths"], mebibytes, ".-", color=color, label=name)
    label = {"val_loss": "validation loss in nats", "val_accuracy": "validation accuracy"}
    quality.set(xlabel="seconds of training", ylabel=label[results["curve"]], xlim=(0, None))
    quality.set_title("Quality over time")
    figure.suptitle(title_of(results))
    for panel, what in ((time, "seconds"), (memory, "MiB added to the process")):
        panel.set(xlabel="tokens", ylabel=what, xscale="log", yscale="log")
        panel.set_xticks(cost["lengths"], [f"{length:,}" for length in cost["lengths"]])
        panel.xaxis.minorticks_off()
    # A short step may add nothing, of which there is no logarithm.
    memory.set_yscale("symlog", linthresh=1)
    time.set_title("Time of a training step, one sequence")
    memory.set_title("Memory of a training step, one sequence")
    for panel in (quality, time, memory):
        panel.grid(alpha=0.3)
    quality.legend()
    return figure


if __name__ == "__main__":
    main()
