"""Build `performer_secondary_structure_small`, which labels residues, and its softmax twin.

With PyTorch each of the two takes half an hour of an x86 core; `--without-twin` publishes while the
twin is unfinished.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import residue_labels
from training.data.secondary_structure import load_secondary_structure
from zoo.build import tables
from zoo.build._preset import publish
from zoo.build._record import Data, Record
from zoo.build._runs import facts, figures, run_with_twin

NAME = "performer_secondary_structure_small"
CONFIG = "secondary_structure.toml"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    model, output, twin, phrase = run_with_twin(residue_labels, CONFIG, NAME, argv)
    publish(output / "preset", make_record(model, twin, phrase), heldout_inputs(output))
    tables.main()


def make_record(model: dict[str, Any], twin: dict[str, Any] | None, phrase: str) -> Record:
    """Return what the card says of the runs."""
    splits = load_secondary_structure()
    room = model["config"]["data"]["sequence_length"] - 2
    return Record(
        name=NAME,
        task="PerformerTokenClassifier",
        summary="The secondary structure of each residue of a protein, in DSSP's eight states, "
        "from the sequence alone.",
        data=Data(
            source="Chains of the Protein Data Bank with the states that DSSP gives them, from "
            "Debian's promod3-data 3.2.1+ds-6.",
            licence="Apache-2.0 (ProMod3); the PDB's data are CC0 1.0.",
            split="By clusters around representatives at 30 % identity. Of 250 test chains 29 "
            "have a training chain of 30 % or more, and 1 of 50 %, over 80 % of both (mmseqs "
            "easy-search).",
            counts={f"{split} chains": len(examples) for split, examples in splits.items()},
        ),
        evaluation=evaluation(model),
        metrics=figures(ROWS, "majority", model, twin),
        softmax_twin=phrase,
        baseline="always the most frequent state; for cross-entropy the frequencies of the states "
        "in the training chains.",
        limits=[
            "It reads one sequence, no alignment: methods with evolutionary profiles or large "
            "language models are right at 80 % of the residues and more.",
            "Residues that a crystal does not show are missing from the chains it saw.",
            f"It saw windows of at most {room} residues.",
        ],
        intended_use="A quick look at a protein, an encoder to fine-tune, and an example. The "
        "states are in `classes.json`, in the order of the outputs.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(model, float(np.mean([min(len(e.text), room) + 2 for e in splits["train"]]))),
    )


ROWS = (
    ("Q3 in %", "higher", "q3", 100),
    ("Q8 in %", "higher", "q8", 100),
    ("cross-entropy in nats", "lower", "cross_entropy", 1),
)


def evaluation(model: dict[str, Any]) -> str:
    """Return what was measured, and how sure it is."""
    test = model["test"]
    means = (
        f"{key.upper()} is {100 * mean:.2f} ± {100 * error:.2f} %"
        for key in ("q3", "q8")
        for mean, error in [test["model"][f"{key}_per_protein"].values()]
    )
    return (
        f"{test['residues']:,} residues of {test['proteins']:,} chains of the test split. As the "
        f"mean over chains, with its standard error, {' and '.join(means)}."
    )


def heldout_inputs(output: Path) -> dict[str, np.ndarray]:
    """Return chains of the test split, on which the effect of rounding is measured."""
    from keras_performer.models import PerformerTokenClassifierPreprocessor

    preprocessor = PerformerTokenClassifierPreprocessor.from_preset(str(output / "preset"))
    return preprocessor([example.text for example in load_secondary_structure()["test"][:64]])


if __name__ == "__main__":
    main()
