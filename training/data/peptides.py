"""Short peptides, antimicrobial or not: of 7 to 174 residues.

Antimicrobial ones are those of the database APD3, the others random entries of UniProt with up to
50 residues, as the PyPI package modlamp (BSD-3-Clause) holds them.
"""

import csv

from training.data.clusters import require_mmseqs, split_by_cluster
from training.data.examples import Example, Splits, cached_splits
from training.data.registry import fetch_python_package, package_files

PACKAGE = (
    "modlamp",
    "4.3.3",
    "6948bcbc4a9614d10b6b47a051d4576c42fe8e5487fbbeb3cfe0d8033eb27f91",
)
IDENTITY_PERCENT = 30


def load_peptides() -> Splits:
    """Read the peptides, with `antimicrobial` or `other` as label.

    The file has 2,600 of each. Each sequence is kept once, which leaves 2,562 and 2,080: 22 of the
    random entries are antimicrobial ones, and count as such. Clusters at 30 % identity go as a
    whole to one split, by the hash of their representative's name: 80 % training, 10 % validation,
    10 % test. Members of two clusters may be relatives: 50 of the 480 test peptides have a training
    one of 70 % identity or more, so figures are of new peptides of known families. Length alone
    tells much: antimicrobial ones are shorter, but only they pass 50.

    **Returns** The splits. Names are line numbers of the file.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had or mmseqs is
    missing.

    **Example**

    >>> load_peptides()["test"][0].label  # doctest: +SKIP
    'antimicrobial'
    """

    def prepare() -> Splits:
        require_mmseqs()
        package = fetch_python_package(*PACKAGE)
        ((_, content),) = package_files(package, "modlamp/data/AMPvsUniProt.csv")
        peptides = read_peptides(content.decode("ascii"))
        return split_by_cluster(peptides, IDENTITY_PERCENT)

    return cached_splits(f"peptides_{PACKAGE[1]}_{IDENTITY_PERCENT}", prepare)


def read_peptides(table: str) -> list[Example]:
    r"""Return the distinct sequences of a table: a header, then lines of sequence and 0 or 1.

    **Example**

    >>> read_peptides("2,1,UniProt,AMP\nMKV, 0\nMKV, 1\n")
    [Example(name='2', text='MKV', label='antimicrobial')]
    """
    found: dict[str, Example] = {}
    for number, (sequence, kind) in enumerate(csv.reader(table.splitlines()[1:]), start=2):
        known = found.get(sequence)
        name = known.name if known else str(number)
        active = kind.strip() == "1" or (known is not None and known.label == "antimicrobial")
        found[sequence] = Example(name, sequence, "antimicrobial" if active else "other")
    return list(found.values())
