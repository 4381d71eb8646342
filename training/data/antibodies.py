"""Variable domains of antibodies: 50,000 each of heavy and light chains and of nanobodies.

They are the test sets of AbNatiV (Ramon, Ali, Greenig, Sormanni et al.), natural repertoires with
their alignment, as the wheel of the PyPI package abnativ holds them. Licence: CC BY-NC-SA 4.0, so
not for commercial use; ship no part of them.
"""

import csv
import hashlib
import io
from pathlib import Path

from training.data.fasta import Protein
from training.data.registry import fetch_python_package, package_files

PACKAGE = (
    "abnativ",
    "2.0.9",
    "85582a5e801430b110d3770d6d76e9e8e6958b7378a83b531cda0d1a7cb77756",
)
CHAINS = {"heavy": "vh", "light": "vl", "nanobody": "vhh"}
"""The kinds of domains, with their names in the package."""
# AHo's numbering gives every domain 149 places; these are the third complementarity-determining
# region, positions 107 to 138.
_ALIGNED_LENGTH, _CDR3 = 149, slice(106, 138)
_HELD_OUT = 26  # of 256


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
        is_heldout = hashlib.sha256(region.encode()).digest()[0] < _HELD_OUT
        (heldout if is_heldout else train).append(Protein(row["seq_id"], "", sequence))
    return train, heldout
