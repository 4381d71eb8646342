"""Clusters of related proteins: made with mmseqs2, or read from its two-column table."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from training.data.examples import Example, Splits, split_by_key
from training.data.fasta import Protein


def require_mmseqs() -> None:
    """Raise an OSError that says what to install if mmseqs is missing."""
    if shutil.which("mmseqs") is None:
        raise OSError(
            "Clustering proteins needs mmseqs. Install the package mmseqs2 (Debian, Homebrew and "
            "Bioconda have it)."
        )


def cluster_proteins(
    proteins: Iterable[Protein], identity_percent: int, *, thorough: bool = False
) -> dict[str, str]:
    """Cluster proteins by identity over 80 % of the shorter sequence.

    A member is like its representative. Two members, of one cluster or of two, may be more or less
    alike than that: a split by clusters keeps most relatives together, not all.

    **Args**
        proteins: With distinct names.
        identity_percent: Identity at which a protein joins a cluster.
        thorough: Compare all with all (`easy-cluster`), which identities below 50 % need.
            Otherwise in linear time (`easy-linclust`).

    **Returns** The name of its cluster's representative for the name of each protein.

    **Raises** OSError, with what to do, if mmseqs is missing or fails; ValueError for names that it
    would not give back.

    **Example**

    >>> cluster_proteins(proteins, 30, thorough=True)["P12345"]  # doctest: +SKIP
    'P00001'
    """
    require_mmseqs()
    proteins = list(proteins)
    for protein in proteins:
        if not protein.name or "|" in protein.name:
            raise ValueError(
                "Names of proteins must not be empty or hold a '|', of which mmseqs keeps a part: "
                f"pass accessions. Received: {protein.name!r}"
            )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with (scratch / "all.fasta").open("w", encoding="ascii") as file:
            file.writelines(f">{p.name}\n{p.sequence}\n" for p in proteins)
        options = ["--min-seq-id", str(identity_percent / 100), "-c", "0.8", "--cov-mode", "1"]
        workflow = "easy-cluster" if thorough else "easy-linclust"
        command = ["mmseqs", workflow, "all.fasta", "clusters", "scratch", *options]
        result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        if result.returncode:
            raise OSError(f"`{' '.join(command)}` failed: {(result.stdout + result.stderr)[-500:]}")
        return read_clusters(scratch / "clusters_cluster.tsv")


def split_by_cluster(examples: Sequence[Example], identity_percent: int) -> Splits:
    """Cluster sequences thoroughly, and let each cluster go to one split as a whole.

    **Args**
        examples: Protein sequences with distinct names.
        identity_percent: As in `cluster_proteins`.

    **Returns** The splits, by the hash of the name of a cluster's representative.

    **Raises** As `cluster_proteins`.

    **Example**

    >>> splits = split_by_cluster(examples, 30)  # doctest: +SKIP
    """
    proteins = (Protein(example.name, "", example.text) for example in examples)
    clusters = cluster_proteins(proteins, identity_percent, thorough=True)
    return split_by_key((clusters[example.name], example) for example in examples)


def read_clusters(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a table of clusters: representative and member, with a tab between, as mmseqs writes it.

    **Returns** The representative of each member, in the order of the table.

    **Raises** FileNotFoundError if there is no such file. ValueError, with file and line, for a
    line without two columns and a member of two clusters.

    **Example**

    >>> read_clusters("clusters_cluster.tsv")["P12345"]  # doctest: +SKIP
    'P00001'
    """
    representatives: dict[str, str] = {}
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            columns = line.rstrip("\r\n").split("\t")
            if len(columns) != 2:
                raise ValueError(
                    f"{path}, line {number}: a representative, a tab and a member were expected, "
                    f"as in mmseqs' `*_cluster.tsv`. Received: {line[:60]!r}"
                )
            representative, member = columns
            if representatives.setdefault(member, representative) != representative:
                raise ValueError(
                    f"{path}, line {number}: {member!r} is in the clusters of both "
                    f"{representatives[member]!r} and {representative!r}. Keep one of the lines."
                )
    return representatives
