"""Variable domains of antibodies: AbNatiV's for scoring, human heavy chains for training.

`load_antibodies`: 50,000 each of heavy and light chains and of nanobodies. They are the test sets
of AbNatiV (Ramon, Ali, Greenig, Sormanni et al.), natural repertoires with their alignment, as the
wheel of the PyPI package abnativ holds them. Licence: CC BY-NC-SA 4.0, so not for commercial use;
ship no part of them.

`load_human_heavy_chains`: the example data of TIgGER (D. Gadala-Maria, J. Vander Heiden, S.
Kleinstein; doi 10.1073/pnas.1417683112), the repertoire of one person, as Debian's r-cran-tigger
holds them. Licence: CC BY-SA 4.0 by Debian's copyright file; the `DESCRIPTION` of that version of
the package says AGPL-3. Changed here: translated, and what is incomplete or repeated left out.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

from training.data.fasta import Protein
from training.data.r_data import read_r_database
from training.data.registry import (
    fetch_debian_package,
    fetch_python_package,
    files_by_name,
    package_files,
)

PACKAGE = (
    "abnativ",
    "2.0.9",
    "85582a5e801430b110d3770d6d76e9e8e6958b7378a83b531cda0d1a7cb77756",
)
HUMAN_PACKAGE = (
    "r-cran-tigger",
    "1.0.1-1",
    "8718167d854f55e9d86c12be35d018508e459cdcb46843841005496e2083fc7a",
)
CHAINS = {"heavy": "vh", "light": "vl", "nanobody": "vhh"}
"""The kinds of domains, with their names in the package."""
# AHo's numbering gives every domain 149 places; these are the third complementarity-determining
# region, positions 107 to 138.
_ALIGNED_LENGTH, _CDR3 = 149, slice(106, 138)
_HELD_OUT = 26  # of 256
# The genetic code, with bases in the order TCAG.
_CODE = dict(
    zip(
        (a + b + c for a in "TCAG" for b in "TCAG" for c in "TCAG"),
        "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG",
        strict=True,
    )
)
# The junction is the third region between the cysteine of 104 and the tryptophan of 118. A complete
# domain has a frame of 80 residues and more before it, and goes on to the serines of its end.
_JUNCTION, _FRAME, _END = re.compile("C.*W"), 80, re.compile(".{7}VSS")


def load_antibodies(chain: str = "heavy") -> tuple[list[Protein], list[Protein]]:
    """Read the domains of one kind, without repeats.

    A tenth is held out, by a hash of the third complementarity-determining region, so no antibody
    that is held out shares that region with one in training. AntiBERTy and Sapiens learned the
    Observed Antibody Space, from which most of these come: they may have seen both parts.

    **Args**
        chain: "heavy", "light" or "nanobody".

    **Returns** The domains for training and those held out, in the order of the package.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had; ValueError for
    another chain.

    **Example**

    >>> train, heldout = load_antibodies("light")  # doctest: +SKIP
    """
    if chain not in CHAINS:
        raise ValueError(f"chain must be one of {', '.join(CHAINS)}. Received: chain={chain!r}")
    return read_package(fetch_python_package(*PACKAGE), chain)


def read_package(package: Path, chain: str) -> tuple[list[Protein], list[Protein]]:
    """Return what the wheel holds of one kind; see `load_antibodies`.

    **Raises** ValueError if a domain is not aligned to AHo's numbering.
    """
    pattern = f"*/test_{CHAINS[chain]}_v2_abnativ_seq_scores.csv"
    ((_, content),) = package_files(package, pattern)
    train: list[Protein] = []
    heldout: list[Protein] = []
    seen: set[str] = set()
    for row in csv.DictReader(io.StringIO(content.decode("utf-8"))):
        sequence, aligned = row["input_seq"], row["aligned_seq"]
        if len(aligned) != _ALIGNED_LENGTH or aligned.replace("-", "") != sequence:
            raise ValueError(
                f"{package}: a domain in AHo's numbering, of {_ALIGNED_LENGTH} places, was "
                f"expected. Received: {aligned!r} for {sequence!r}"
            )
        if sequence in seen:
            continue
        seen.add(sequence)
        region = aligned[_CDR3].replace("-", "")
        (heldout if _is_heldout(region) else train).append(Protein(row["seq_id"], "", sequence))
    return train, heldout


def load_human_heavy_chains() -> tuple[list[Protein], list[Protein]]:
    """Read human heavy chains, complete domains without repeats.

    The split is that of `load_antibodies`, by the same region: no domain that either holds out
    shares its third region with one that the other trains on.

    **Returns** The domains for training and those held out, in the order of the package.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had.

    **Example**

    >>> train, heldout = load_human_heavy_chains()  # doctest: +SKIP
    """
    return read_human_package(fetch_debian_package(*HUMAN_PACKAGE))


def read_human_package(package: Path) -> tuple[list[Protein], list[Protein]]:
    """Return what the Debian package holds; see `load_human_heavy_chains`."""
    files = files_by_name(package, "*/data/Rdata.*")
    table = read_r_database(files["Rdata.rdx"], files["Rdata.rdb"])["AIRRDb"]
    columns = (table[name] for name in ("sequence_id", "sequence_alignment", "junction"))
    return split_rearrangements(zip(*columns, strict=True))


def split_rearrangements(
    rows: Iterable[tuple[str, str, str]],
) -> tuple[list[Protein], list[Protein]]:
    """Translate rearranged genes, and divide the complete domains by their third region.

    **Args**
        rows: Name, the gene from the first codon of IMGT's numbering on, with dots for its gaps,
            and the junction, from the codon of the cysteine 104 to that of the tryptophan 118.
    """
    train: list[Protein] = []
    heldout: list[Protein] = []
    seen: set[str] = set()
    for name, gene, junction in rows:
        domain, loop = translate(gene), translate(junction)
        if domain is None or loop is None or domain in seen or not _JUNCTION.fullmatch(loop):
            continue
        frame, _, end = domain.rpartition(loop)
        if len(frame) < _FRAME or not _END.fullmatch(end):
            continue  # out of frame, or incomplete
        seen.add(domain)
        (heldout if _is_heldout(loop[1:-1]) else train).append(Protein(name, "", domain))
    return train, heldout


def translate(gene: str) -> str | None:
    """Translate codons; gaps of whole codons, `...`, and bases beyond the last codon are left out.

    **Returns** The residues, or None if the gene begins with a gap, or has a stop or a codon with
    an unknown base or a gap in it.

    **Example**

    >>> translate("GAG...GTGCAGC")
    'EVQ'
    """
    codons = [gene[i : i + 3] for i in range(0, len(gene) - 2, 3)]
    residues = [_CODE.get(codon) for codon in codons if codon != "..."]
    if codons[:1] == ["..."] or None in residues or "*" in residues:
        return None
    return "".join(residue for residue in residues if residue)


def _is_heldout(region: str) -> bool:
    return hashlib.sha256(region.encode()).digest()[0] < _HELD_OUT
