"""Proteins to pretrain on, by the name of their source or from a user's file, and held-out ones."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from training.data.fasta import Protein, read_fasta
from training.data.localisation import localisation_heldout
from training.data.protein_packages import load_metastudent, load_mmseqs2_examples
from training.data.protein_sample import load_protein_sample


def metastudent_for_pretraining() -> list[Protein]:
    """Read `load_metastudent`, less what the localisation of proteins is validated and tested on.

    Left out are the proteins with an accession or a sequence of those.

    **Raises** As `load_metastudent` and `load_localisation`.

    **Example**

    >>> len(metastudent_for_pretraining()) > 100_000  # doctest: +SKIP
    True
    """
    return _less_localisation(load_metastudent())


def mmseqs2_examples_for_pretraining() -> list[Protein]:
    """Read `load_mmseqs2_examples`, less the same.

    **Raises** As `load_mmseqs2_examples` and `load_localisation`.

    **Example**

    >>> len(mmseqs2_examples_for_pretraining())  # doctest: +SKIP
    19971
    """
    return _less_localisation(load_mmseqs2_examples())


def _less_localisation(proteins: list[Protein]) -> list[Protein]:
    heldout = localisation_heldout()
    names = {protein.name for protein in heldout}
    sequences = {protein.sequence for protein in heldout}
    return [
        protein
        for protein in proteins
        # Of `sp|P12345|X_HUMAN` the accession stands between the bars.
        if names.isdisjoint(protein.name.split("|")) and protein.sequence not in sequences
    ]


# What a source may be beside "sample", which has a held-out part of its own.
PACKAGES: dict[str, Callable[[], list[Protein]]] = {
    "mmseqs2_examples": mmseqs2_examples_for_pretraining,
    "metastudent": metastudent_for_pretraining,
}
SOURCES = ("sample", *PACKAGES)


def load_proteins(
    source: str, heldout_share: float, fasta: Path | None = None
) -> tuple[list[Protein], list[Protein], str]:
    """Return the training proteins, the held-out proteins, and a phrase that names the source.

    The sample comes divided. Elsewhere identical sequences count once, and the hash of a sequence
    decides its part.

    **Args**
        source: One of `SOURCES`.
        heldout_share: Share of the proteins that is held out.
        fasta: A file in place of `source`.

    **Raises** OSError or ValueError, in one sentence, for proteins that cannot be had or used.

    **Example**

    >>> len(load_proteins("sample", 0.1)[1])
    511
    """
    if fasta is None and source == "sample":
        train, heldout = load_protein_sample()
        phrase = "the shipped sample"
    else:
        phrase = source if fasta is None else str(fasta)
        records = PACKAGES[source]() if fasta is None else read_fasta(fasta)
        first: dict[str, Protein] = {}
        for record in records:
            first.setdefault(record.sequence, record)
        distinct = list(first.values())
        if all(set("ACGTUN").issuperset(sequence) for sequence in first):
            raise ValueError(
                f"{phrase}: all sequences are made of A, C, G, T, U and N, so they look like DNA "
                "or RNA. Pass protein sequences."
            )
        for protein in distinct:
            if set(protein.sequence) == {"J"}:  # Not in the vocabulary: nothing to predict.
                raise ValueError(f"{phrase}: {protein.name!r} is made of J only. Remove it.")
        bar = heldout_share * 2**64
        train = [protein for protein in distinct if _hash(protein) >= bar]
        heldout = [protein for protein in distinct if _hash(protein) < bar]
        phrase = f"{phrase} ({len(records):,} records, {len(distinct):,} distinct)"
    if len(heldout) < 2:
        raise ValueError(
            f"{phrase}: {len(heldout)} protein(s) would be held out, and 2 or more are needed. "
            "Raise data.heldout_share, or pass more proteins."
        )
    return train, heldout, phrase


def _hash(protein: Protein) -> int:
    """Return a number below 2**64 that depends on the sequence only."""
    return int.from_bytes(hashlib.sha256(protein.sequence.encode()).digest()[:8], "big")
