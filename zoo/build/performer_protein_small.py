"""Build `performer_protein_small`, which fills in residues, and its softmax twin.

With PyTorch each of the two takes two hours of one x86 core and some minutes; `--without-twin`
publishes while the twin is unfinished.
"""

from collections.abc import Sequence

import numpy as np

from training import protein_masked_lm
from zoo.build import tables
from zoo.build._preset import publish
from zoo.build._protein_masked_lm import ROWS, evaluation, heldout_inputs
from zoo.build._record import Record
from zoo.build._runs import facts, figures, run_with_twin
from zoo.build._swiss_prot import swiss_prot

NAME = "performer_protein_small"
CONFIG = "protein_pretraining.toml"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    model, output, twin, phrase = run_with_twin(protein_masked_lm, CONFIG, NAME, argv)
    data, train, heldout = swiss_prot(model)
    room = model["config"]["data"]["sequence_length"] - 2
    record = Record(
        name=NAME,
        task="PerformerMaskedLM",
        summary="A small masked language model of proteins, to fine-tune.",
        data=data,
        evaluation=evaluation(model, twin),
        metrics=figures(ROWS, "unigram", model, twin, "heldout"),
        softmax_twin=phrase,
        baseline="the frequencies of the residues in the training proteins.",
        limits=[
            "Two hours of one core: language models of proteins from accelerators, which "
            "saw thousands of times as many residues, reach perplexities of 6 to 12.",
            f"It saw windows of at most {room} residues.",
            "It helps where labels are few, not everywhere: zoo/README.md compares training from "
            "it with training from scratch.",
        ],
        intended_use="An encoder to fine-tune on small sets of labelled proteins, and an example.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(model, float(np.mean([min(len(p.sequence), room) + 2 for p in train]))),
    )
    publish(output / "preset", record, heldout_inputs(output / "preset", heldout))
    tables.main()


if __name__ == "__main__":
    main()
