"""Build `performer_tiny`, for tests and tutorials: `python -m zoo.build.performer_tiny`.

It trains the model and its softmax twin on the shipped proteins.
"""

from pathlib import Path

import numpy as np

from keras_performer.models import PerformerMaskedLMPreprocessor
from training import protein_masked_lm
from training.data.masked_batches import mask_sequences
from training.data.protein_sample import load_protein_sample
from zoo.build import tables
from zoo.build._preset import publish
from zoo.build._record import Data, Metric, Record
from zoo.build._runs import facts, run

NAME = "performer_tiny"
CONFIG = f"{NAME}.toml"


def main() -> None:
    """Train, and write the folder and the tables."""
    model, output = run(protein_masked_lm, CONFIG, NAME)
    twin, _ = run(protein_masked_lm, CONFIG, f"{NAME}_softmax", "model.attention=softmax")

    heldout = model["heldout"]
    margin, twin_margin = heldout["difference"], twin["heldout"]["difference"]
    scores = (heldout["model"], twin["heldout"]["model"], heldout["unigram"])
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
                "proteins held out": heldout["proteins"],
            },
        ),
        evaluation=(
            f"{heldout['masked_residues']:,} masked residues of the held-out proteins, in windows "
            "of at most 126 residues. Cross-entropy, mean over proteins, is "
            f"{margin['mean']:.4f} ± {margin['standard_error']:.4f} nats below the baseline's; the "
            f"twin's is {twin_margin['mean']:.4f} ± {twin_margin['standard_error']:.4f} below."
        ),
        metrics=[
            Metric("perplexity", "lower", *(score["perplexity"] for score in scores)),
            Metric("cross-entropy in nats", "lower", *(score["cross_entropy"] for score in scores)),
            Metric("accuracy in %", "higher", *(100 * score["accuracy"] for score in scores)),
        ],
        softmax_twin='the same config with `attention = "softmax"`: same tokens, steps and '
        "parameters but for the random features.",
        baseline="the frequencies of the residues in the training proteins.",
        limits=[
            "It knows little more than which residues keep company: do not use its predictions.",
            "It saw windows of 126 residues.",
        ],
        intended_use="Tests, tutorials and trying out the package. It is no model for research.",
        rebuild=f"python -m zoo.build.{NAME}",
        # Whole windows, which hold 123 tokens of 128 in the mean.
        **facts(model, model["config"]["data"]["sequence_length"]),
    )
    publish(output / "preset", record, heldout_inputs(output))
    tables.main()


def heldout_inputs(output: Path) -> dict[str, np.ndarray]:
    """Return masked held-out proteins, on which the effect of rounding is measured."""
    preprocessor = PerformerMaskedLMPreprocessor.from_preset(output / "preset")
    _, heldout = load_protein_sample()
    ids = [np.asarray(preprocessor.tokenizer.tokenize(p.sequence), "int32") for p in heldout[:64]]
    inputs, _, _ = mask_sequences(ids, preprocessor, np.random.default_rng(0), always_mask=True)
    return inputs


if __name__ == "__main__":
    main()
