"""What the cards of language models of proteins say of what they were trained on."""

from collections.abc import Sequence
from typing import Any

from training.data.fasta import Protein
from training.data.protein_sources import load_proteins
from zoo.build._record import Data


def swiss_prot(model: dict[str, Any]) -> tuple[Data, Sequence[Protein], Sequence[Protein]]:
    """Return a card's part on data, the proteins to train on, and the held-out ones.

    **Args**
        model: The figures of a run on the source "metastudent".
    """
    data = model["config"]["data"]
    train, heldout, _ = load_proteins(data["source"], data["heldout_share"])
    card = Data(
        source="Swiss-Prot of January 2014, one protein of each cluster at 50 % identity, from "
        "Debian's metastudent-data 2.0.1-8, less what localisation is validated and tested on.",
        licence="The sequences are UniProt's (CC BY 4.0). The data are not redistributed here.",
        split="By the hash of the sequence. Of 300 held-out proteins 20 have a relative of 60 % "
        "identity or more in a third of the training proteins: clusters hold who is like a "
        "representative.",
        counts={
            "proteins to train on": len(train),
            "residues to train on": sum(len(protein.sequence) for protein in train),
            "proteins held out": len(heldout),
        },
    )
    return card, train, heldout
