"""Build `performer_tiny`, for tests and tutorials: `python -m zoo.build.performer_tiny`.

It trains the model and its softmax twin on the shipped proteins. With JAX it takes about 25 minutes
of two x86 cores that other work shared.
"""

from collections.abc import Sequence

import numpy as np

from training import protein_masked_lm
from training.data.protein_sample import load_protein_sample
from zoo.build import tables
from zoo.build._preset import publish
from zoo.build._protein_masked_lm import ROWS, evaluation, heldout_inputs
from zoo.build._record import Data, Record
from zoo.build._runs import facts, figures, run_with_twin

NAME = "performer_tiny"
CONFIG = f"{NAME}.toml"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    model, output, twin, phrase = run_with_twin(protein_masked_lm, CONFIG, NAME, argv)
    train, heldout = load_protein_sample()
    room = model["config"]["data"]["sequence_length"] - 2
    record = Record(
        name=NAME,
        task="PerformerMaskedLM",
        summary="A very small masked language model of proteins, for tests and tutorials.",
        data=Data(
            source="`training/data/sample`: part of the data set SCL2205 of D. Ouso and G. "
            "Pollastri, with sequences of UniProtKB release 2022_05.",
            licence="CC BY 4.0 (sequences, UniProt Consortium), CC0 1.0 (data set).",
            split="By a hash of the accession; no training protein is a near relative of a "
            "held-out one.",
            counts={
                "proteins to train on": model["train_proteins"],
                "proteins held out": model["heldout"]["proteins"],
            },
        ),
        evaluation=evaluation(model, twin),
        metrics=figures(ROWS, "unigram", model, twin, "heldout"),
        softmax_twin=phrase,
        baseline="the frequencies of the residues in the training proteins.",
        limits=[
            "It knows little more than which residues keep company: do not use its predictions.",
            f"It saw windows of {room} residues.",
        ],
        intended_use="Tests, tutorials and trying out the package. It is no model for research.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(model, float(np.mean([min(len(p.sequence), room) + 2 for p in train]))),
    )
    publish(output / "preset", record, heldout_inputs(output / "preset", heldout))
    tables.main()


if __name__ == "__main__":
    main()
