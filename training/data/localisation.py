"""Where a protein works in the cell: 13 classes, with the splits that the data set's authors give.

Data set SCL2205 (Ouso and Pollastri 2026, CC0; sequences from UniProt, CC BY 4.0), as the source
distribution of the PyPI package p-scldata holds it.
"""

import csv
import io
import json
from pathlib import Path

from training.data.examples import Example, Splits
from training.data.fasta import Protein
from training.data.folds import NUM_FOLDS, check_fold
from training.data.protein_sample import LOCALISATIONS
from training.data.registry import fetch_python_package, files_by_name

PACKAGE = (
    "p-scldata",
    "2026.2.0",
    "2e7c8a3991b9aea334ac583c36e6610f8a41324d9a5ecc5a10415b9591d743e4",
)
_GIVEN_SPLITS = {"train": "trn", "validation": "vld", "test": "tst"}


def load_localisation(fold: int | None = None) -> Splits:
    """Read the proteins with their class, one of the keys of `LOCALISATIONS`.

    Validation and test are as given, 1,260 and 2,631 proteins; two sequences are in both. Left out
    of training are the 25 proteins whose sequence is in one of them, which leaves 15,158.

    For cross-validation the authors divide 6,165 of the proteins for training and validation among
    five folds. With `fold`, that one is the test, the next the validation, and all others of the
    16,443 are for training but those with a sequence of either: over `fold` = 0 to 4 each of the
    6,165 is tested once, and the given test split is never seen.

    **Args**
        fold: From 0 to 4; None takes the splits as given.

    **Returns** The splits. Names are UniProt accessions.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had; ValueError if
    there is no such fold.

    **Example**

    >>> load_localisation()["test"][0].label  # doctest: +SKIP
    'NUC'
    """
    if fold is not None:
        check_fold(fold)
    return read_package(fetch_python_package(*PACKAGE, source=True), fold)


def localisation_heldout() -> list[Protein]:
    """Return the proteins of validation and test as given, for pretraining to leave out.

    Leave out what has one of their names *or* sequences: accessions change, and one sequence may
    have several.

    **Raises** As `load_localisation`.

    **Example**

    >>> names = {protein.name for protein in localisation_heldout()}  # doctest: +SKIP
    """
    splits = load_localisation()
    heldout = splits["validation"] + splits["test"]
    return [Protein(example.name, "", example.text) for example in heldout]


def read_package(package: Path, fold: int | None = None) -> Splits:
    """Return the splits that the source distribution holds; see `load_localisation`."""
    files = files_by_name(package, "*/scldata/data/*")
    codes = {name: code for code, name in LOCALISATIONS.items()}
    names = json.loads(files["labels.json"])["index_to_label"]
    rows = [
        Example(row["entry"], row["seq"], codes[names[row["scl"]]])
        for row in csv.DictReader(io.StringIO(files["scl2205.csv"].decode("utf-8")))
    ]
    places = json.loads(files["splits.json"])
    if fold is not None:
        folds = [places["cv"][f"f{k}"] for k in (fold, (fold + 1) % NUM_FOLDS)]
        tested, validated = (part["vld"] for part in folds)
        places = {"trn": folds[0]["trn"], "vld": validated, "tst": tested}
    splits = {name: [rows[i] for i in places[given]] for name, given in _GIVEN_SPLITS.items()}
    heldout = {example.text for name in ("validation", "test") for example in splits[name]}
    splits["train"] = [example for example in splits["train"] if example.text not in heldout]
    return splits
