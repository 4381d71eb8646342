"""Build `performer_protein_causal_small`, which writes proteins, and its softmax twin.

With PyTorch it takes an hour and a half of one shared x86 core; `--without-twin` publishes while
the twin is unfinished.
"""

from collections.abc import Sequence

from zoo.build import tables
from zoo.build._causal_lm import PROTEIN_ROWS, evaluation, heldout_inputs, run_causal_lm
from zoo.build._preset import publish
from zoo.build._record import Record
from zoo.build._runs import facts, figures
from zoo.build._swiss_prot import swiss_prot

NAME = "performer_protein_causal_small"
CONFIG = "protein_causal_lm.toml"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    model, output, twin, phrase = run_causal_lm(CONFIG, NAME, argv)
    data, _, heldout = swiss_prot(model)
    record = Record(
        name=NAME,
        task="PerformerCausalLM",
        summary="A small model that writes proteins residue by residue, with a state of constant "
        "size.",
        data=data,
        evaluation=evaluation(model, "proteins"),
        metrics=figures(PROTEIN_ROWS, "unigram", model, twin),
        softmax_twin=phrase,
        baseline="the frequencies of the residues in the training proteins.",
        limits=[
            "It has the composition and the short motifs of proteins. Nothing says that what it "
            "writes folds, works or is safe.",
            "A processor's hour of training: large models saw thousands of times as many residues.",
        ],
        intended_use="A decoder to train further on a family of proteins, and an example of "
        "packed training and of generation with constant memory.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(model, model["config"]["data"]["sequence_length"]),
    )
    sequences = [protein.sequence[:1000] for protein in heldout[-8:]]
    publish(output / "preset", record, heldout_inputs(output / "preset", sequences))
    tables.main()


if __name__ == "__main__":
    main()
