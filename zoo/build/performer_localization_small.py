"""Build `performer_localization_small`, which says where a protein works, and its softmax twin.

Each of the two goes on from an encoder of its own, a masked language model of its shape that is
trained as `performer_protein_small` is. With PyTorch an encoder takes some 45 minutes of one x86
core and what follows an hour; `--without-twin` publishes while the twin is unfinished.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import classification, protein_masked_lm
from training.data.localisation import load_localisation
from training.data.protein_sample import LOCALISATIONS
from zoo.build import tables
from zoo.build._classification import ROWS, baseline, evaluation, heldout_inputs
from zoo.build._preset import publish
from zoo.build._record import Data, Record
from zoo.build._runs import facts, figures, run, run_with_twin

NAME = "performer_localization_small"
CONFIG = "localisation.toml"
PRETRAINING = "protein_pretraining.toml"
# What fits the shape of `CONFIG`, a sixth of the parameters of `performer_protein_small`.
ENCODER = (
    "model.num_layers=4",
    "model.num_heads=2",
    "model.hidden_dim=128",
    "model.intermediate_dim=512",
    "training.learning_rate=2e-3",
    "training.steps_per_epoch=250",
)
TWIN_PHRASE = (
    "the softmax twin of the pretrained model, trained on with the same config: same tokens, steps "
    "and parameters but for the random features, in both trainings."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    model, output, twin, phrase = run_with_twin(
        classification, CONFIG, NAME, argv, twin_phrase=TWIN_PHRASE, start=run_encoder
    )
    # Short ones, which the preprocessor crops nowhere: it knows nothing of the crop at both ends.
    room = model["config"]["data"]["sequence_length"] - 2
    texts = [e.text for e in load_localisation()["test"] if len(e.text) <= room][:64]
    inputs = heldout_inputs(output / "preset", texts)
    publish(output / "preset", make_record(run_encoder()[0], model, twin, phrase), inputs)
    tables.main()


def run_encoder(end: str = "", *overrides: str) -> tuple[dict[str, Any], Path]:
    """Train the encoder that the run whose name ends so goes on from; see `run`."""
    return run(protein_masked_lm, PRETRAINING, f"{NAME}_encoder{end}", *ENCODER, *overrides)


def make_record(
    encoder: dict[str, Any], model: dict[str, Any], twin: dict[str, Any] | None, phrase: str
) -> Record:
    """Return what the card says of the runs."""
    perplexity = encoder["heldout"]["model"]["perplexity"]
    splits = load_localisation()
    room = model["config"]["data"]["sequence_length"] - 2
    return Record(
        name=NAME,
        task="PerformerSequenceClassifier",
        summary=f"Where in the cell of a eukaryote a protein works, in {len(LOCALISATIONS)} "
        "classes, from the sequence alone; trained on from a masked language model of its shape, "
        f"which was trained as `performer_protein_small` is, to a perplexity of {perplexity:.2f}.",
        data=Data(
            source="Data set SCL2205 (Ouso and Pollastri 2026), from the source distribution of "
            "PyPI's p-scldata 2026.2.0.",
            licence="CC0-1.0; the sequences are UniProt's (CC BY 4.0).",
            split="As its authors give it; training sequences that are also in one of the other "
            "splits were left out, here and in pretraining.",
            counts={f"{split} proteins": len(examples) for split, examples in splits.items()},
        ),
        evaluation=evaluation(model, "proteins"),
        metrics=figures(ROWS, "majority", model, twin),
        softmax_twin=phrase,
        baseline=baseline("proteins"),
        limits=[
            "It takes the cytoplasm, the nucleus and both of them for one another most often.",
            f"Of a protein of more than {room} residues it saw the first and the last "
            f"{room // 2}; join those before you pass them.",
            "Large language models of proteins do better.",
        ],
        intended_use="A first guess, and an example of a classifier on a pretrained encoder. The "
        "classes are in `classes.json`, in the order of the outputs.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(model, float(np.mean([min(len(e.text), room) + 2 for e in splits["train"]]))),
    )


if __name__ == "__main__":
    main()
