"""Large protein sets that Debian packages carry: fetched, checked, prepared and cached."""

import gzip
from collections.abc import Iterable
from pathlib import Path

from training.data.blast_database import read_blast_database
from training.data.clusters import cluster_proteins, require_mmseqs
from training.data.fasta import Protein, read_fasta
from training.data.registry import (
    cache_folder,
    fetch_debian_package,
    package_files,
    replacing,
)

METASTUDENT = (
    "metastudent-data",
    "2.0.1-8",
    "020ed0c560a5ba96f39c434399b3ecf0fa790a4776c4aac24458f837969ae54b",
)
MMSEQS2_EXAMPLES = (
    "mmseqs2-examples",
    "14-7e284+ds-1",
    "ad2a14a4ca48735eff75de49b702ba969187c4e3b7814b8ae4ec0073f17cd4d2",
)
IDENTITY_PERCENT = 50


def load_metastudent() -> list[Protein]:
    """Read one protein of each cluster of the Swiss-Prot sequences of January 2014.

    Clusters are those of mmseqs2's linclust at 50 % identity over 80 % of the shorter sequence. A
    member is so like its representative, but two representatives may still be relatives: of 300
    proteins that a random split held out, 20 had one at 60 % or more in a third of the others.
    The first call fetches 225 MB and takes some minutes; later ones read the cache.

    **Returns** The proteins in order of their accessions, which are their names; descriptions are
    empty.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had or mmseqs is
    missing.

    **Example**

    >>> len(load_metastudent()) > 100_000  # doctest: +SKIP
    True
    """
    path = cache_folder() / f"metastudent_{METASTUDENT[1]}_{IDENTITY_PERCENT}.fasta.gz"
    if not path.is_file():
        require_mmseqs()
        distinct = list(_distinct_metastudent(fetch_debian_package(*METASTUDENT)))
        proteins = {protein.name: protein for protein in distinct}
        # In an order of our own: that of mmseqs may change with its version and threads.
        representatives = sorted(set(cluster_proteins(distinct, IDENTITY_PERCENT).values()))
        _write_fasta((proteins[name] for name in representatives), path)
    return read_fasta(path)


def load_mmseqs2_examples() -> list[Protein]:
    """Read the 20,000 UniProtKB sequences that mmseqs2 ships as an example.

    **Returns** The proteins.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had.

    **Example**

    >>> len(load_mmseqs2_examples())  # doctest: +SKIP
    20000
    """
    path = cache_folder() / f"mmseqs2_examples_{MMSEQS2_EXAMPLES[1]}.fasta.gz"
    if not path.is_file():
        files = dict(package_files(fetch_debian_package(*MMSEQS2_EXAMPLES), "*/DB.fasta.gz"))
        with replacing(path) as unfinished:
            unfinished.write_bytes(files["usr/share/doc/mmseqs2/example-data/DB.fasta.gz"])
    return read_fasta(path)


def _distinct_metastudent(package: Path) -> Iterable[Protein]:
    """Walk over the distinct sequences of the three databases, in order of accession."""
    files = {
        Path(name).parts[-2:]: content
        for name, content in package_files(package, "*/goasp.fasta.p*")
    }
    distinct: dict[str, str] = {}
    for folder in ("MFO", "BPO", "CCO"):
        parts = [files[folder, f"goasp.fasta.{ending}"] for ending in ("pin", "phr", "psq")]
        for protein in read_blast_database(*parts):
            # A header is the accession, a bar, and the GO terms.
            accession = protein.name.partition("|")[0]
            known = distinct.setdefault(protein.sequence, accession)
            distinct[protein.sequence] = min(known, accession)
    for sequence, accession in sorted(distinct.items(), key=lambda item: item[1]):
        yield Protein(accession, "", sequence)


def _write_fasta(proteins: Iterable[Protein], path: Path) -> None:
    with replacing(path) as unfinished, gzip.open(unfinished, "wt", encoding="ascii") as file:
        file.writelines(f">{p.name}\n{p.sequence}\n" for p in proteins)
