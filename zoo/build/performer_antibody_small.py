"""Build `performer_antibody_small`: `python -m zoo.build.performer_antibody_small`.

It converts Sapiens, a model of human heavy chains with softmax attention, and tunes the result.
With PyTorch it takes 12 minutes of one x86 core.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import distill
from training.converted import mask_residues
from training.data.antibodies import load_human_heavy_chains
from zoo.build import tables
from zoo.build._preset import ZOO, publish
from zoo.build._record import Data, Metric, Record
from zoo.build._runs import facts, run

NAME = "performer_antibody_small"
SETS = {"heldout": "own held-out", "abnativ": "AbNatiV"}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    parser = argparse.ArgumentParser(description=f"Build {NAME}.")
    parser.add_argument("--set", action="append", default=[], help="key=value; a trial, with --zoo")
    parser.add_argument("--zoo", type=Path, default=ZOO, help="where the folder goes")
    arguments = parser.parse_args(argv)
    zoo = arguments.zoo.resolve()
    if arguments.set and zoo == ZOO:
        parser.error(
            "--set is for trials, which must not replace the published preset. Pass --zoo with "
            f"another folder. Received: --zoo {arguments.zoo}"
        )
    zoo.mkdir(parents=True, exist_ok=True)
    # A trial has a folder of its own.
    name = f"{NAME}_trial" if arguments.set else NAME
    metrics, output = run(distill, "antibody_distill.toml", name, *arguments.set)
    publish(output / "preset", make_record(metrics), heldout_inputs(output), zoo)
    if zoo == ZOO:
        tables.main()


def make_record(metrics: dict[str, Any]) -> Record:
    """Return what the card says of a run."""
    scored = metrics["heldout"]
    return Record(
        name=NAME,
        task="PerformerRobertaMaskedLM",
        summary="A masked language model of human antibody heavy chains, converted from Sapiens.",
        data=Data(
            source="Weights to begin with: Sapiens, heavy chains (D. Prihoda et al. 2022, doi "
            "10.1080/19420862.2021.2020203; PyPI sapiens 1.0.2). Tuning: example data of TIgGER "
            "(D. Gadala-Maria, J. Vander Heiden, S. Kleinstein, doi 10.1073/pnas.1417683112; "
            "Debian r-cran-tigger 1.0.1-1), translated. Scoring only: heavy chains of AbNatiV "
            "(PyPI abnativ 2.0.9).",
            licence="Sapiens: MIT. TIgGER's data: CC BY-SA 4.0 "
            "(https://creativecommons.org/licenses/by-sa/4.0/) by Debian's copyright file, AGPL-3 "
            "by the DESCRIPTION of that version. AbNatiV: CC BY-NC-SA 4.0, no part of it is in "
            "these weights.",
            split="By a hash of the third complementarity-determining region; the same for both "
            "sets, so no scored domain shares that region with one in tuning. Sapiens itself "
            "learned the Observed Antibody Space and may have seen scored domains.",
            counts={
                "domains to tune on": metrics["train_sequences"],
                "own domains scored": scored["heldout"]["sequences"],
                "AbNatiV's domains scored": scored["abnativ"]["sequences"],
            },
        ),
        evaluation=" ".join(evaluation(SETS[part], result) for part, result in scored.items()),
        metrics=[metric for part in scored for metric in figures(SETS[part], scored[part])],
        softmax_twin="the original Sapiens, with softmax attention and as its authors trained it; "
        "it had none of the tuning.",
        baseline="the frequencies of the residues in the domains to tune on.",
        limits=[
            "It reads up to 142 residues, which its exact windows cover in part: it is an example "
            "of a conversion, and no faster than the original at such lengths.",
            "It was tuned on heavy chains of one person.",
            "It knows the 20 usual residues; write others as the mask.",
        ],
        intended_use="Scoring and filling in residues of human heavy chains in research, and as an "
        "example of a converted model. Not for clinical decisions.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(metrics, metrics["mean_tokens"]),
    )


def figures(name: str, result: dict[str, Any]) -> list[Metric]:
    """Return the figures of one set."""
    rows = [result[key] for key in ("distilled", "original", "unigram")]
    perplexities = [row["perplexity"]["mean"] for row in rows]
    accuracies = [100 * row["accuracy"]["mean"] for row in rows]
    return [
        Metric(f"perplexity, {name}", "lower", *perplexities),
        Metric(f"accuracy in %, {name}", "higher", *accuracies),
    ]


def evaluation(name: str, result: dict[str, Any]) -> str:
    """Return what the stages have lost or won on one set."""
    gains = (
        f"{100 * gain['mean']:+.2f} ± {100 * gain['standard_error']:.2f} {stage}"
        for stage in distill.STAGES[1:]
        for gain in [result[stage]["minus_original"]["accuracy"]]
    )
    return (
        f"{name}: {result['masked_residues']:,} masked residues of {result['sequences']:,} "
        f"domains; accuracy minus the original's, in points, paired: {', '.join(gains)}."
    )


def heldout_inputs(output: Path) -> dict[str, np.ndarray]:
    """Return masked held-out domains, on which the effect of rounding is measured."""
    from keras_performer.convert import PerformerRobertaMaskedLM

    model = PerformerRobertaMaskedLM.from_preset(str(output / "preset"))
    sequences = [protein.sequence for protein in load_human_heavy_chains()[1][:64]]
    rng = np.random.default_rng(0)
    return mask_residues(sequences, model.preprocessor.tokenizer, 142, 15, rng).inputs


if __name__ == "__main__":
    main()
