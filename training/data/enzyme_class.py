"""What kind of reaction a protein catalyses, if any: from its GO terms in metastudent-data.

The sequences are those of Swiss-Prot of January 2014 with a term for their molecular function.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from training.data.blast_database import read_blast_database
from training.data.clusters import require_mmseqs, split_by_cluster
from training.data.examples import Example, Splits, cached_splits
from training.data.fasta import Protein
from training.data.protein_packages import METASTUDENT
from training.data.registry import fetch_debian_package, files_by_name

IDENTITY_PERCENT = 30
NON_ENZYME = "non-enzyme"
# The first six classes of the Enzyme Commission and the GO term for each.
ENZYME_CLASSES = {
    "oxidoreductase": "GO:0016491",
    "transferase": "GO:0016740",
    "hydrolase": "GO:0016787",
    "lyase": "GO:0016829",
    "isomerase": "GO:0016853",
    "ligase": "GO:0016874",
}
_CATALYTIC = "GO:0003824"
_ROOT = "GO:0003674"  # On its own it says that nothing is known.


def load_enzyme_classes() -> Splits:
    """Read the proteins, with a key of `ENZYME_CLASSES` or `NON_ENZYME` as label.

    A term counts together with its ancestors. Left out are proteins of several classes (18,610), of
    an unknown function (10,256), and catalysts of no class (1,729); 356,432 sequences stay.
    Clusters at 30 % identity go as a whole to one split, by the hash of their representative's
    name: 80 % training, 10 % validation, 10 % test; a random split would leak. The terms are mostly
    inferred by similarity, so relatives beyond the clusters may have got their label from each
    other. The first call fetches 225 MB and takes minutes.

    **Returns** The splits. Names are UniProt accessions.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had or mmseqs is
    missing.

    **Example**

    >>> load_enzyme_classes()["test"][0].label  # doctest: +SKIP
    'hydrolase'
    """

    def prepare() -> Splits:
        require_mmseqs()
        package = fetch_debian_package(*METASTUDENT)
        files = files_by_name(package, "*/MFO/goasp.fasta.p*", "*/fullTransitiveClosureGO.txt")
        parts = [files[f"goasp.fasta.{ending}"] for ending in ("pin", "phr", "psq")]
        ancestors = read_ancestors(files["fullTransitiveClosureGO.txt"].decode("ascii"))
        examples = list(_labelled(read_blast_database(*parts), ancestors))
        return split_by_cluster(examples, IDENTITY_PERCENT)

    return cached_splits(f"enzyme_class_{METASTUDENT[1]}_{IDENTITY_PERCENT}", prepare)


def read_ancestors(table: str) -> dict[str, set[str]]:
    """Return the terms above each term, from lines of term, relation, term above, and distance."""
    ancestors: dict[str, set[str]] = defaultdict(set)
    for line in table.splitlines():
        term, relation, above, _ = line.split("\t")
        if relation == "OBO_REL:is_a":
            ancestors[term].add(above)
    return ancestors


def enzyme_class(terms: Iterable[str], ancestors: Mapping[str, set[str]]) -> str | None:
    """Return the class that GO terms stand for; None if they leave it open.

    **Example**

    >>> enzyme_class(["GO:0016829"], {})
    'lyase'
    """
    known = set(terms) - {_ROOT}
    whole = known.union(*(ancestors.get(term, ()) for term in known))
    classes = [name for name, term in ENZYME_CLASSES.items() if term in whole]
    if len(classes) == 1:
        return classes[0]
    return NON_ENZYME if known and _CATALYTIC not in whole and not classes else None


def _labelled(proteins: Iterable[Protein], ancestors: Mapping[str, set[str]]) -> Iterable[Example]:
    """Walk over the distinct sequences that have a class, in order of accession.

    A sequence has the terms of all proteins with it, and the first of their accessions.
    """
    names: dict[str, str] = {}
    terms: dict[str, set[str]] = defaultdict(set)
    for protein in proteins:
        # A header is the accession, a bar, and the GO terms.
        accession, _, listed = protein.name.partition("|")
        names[protein.sequence] = min(accession, names.get(protein.sequence, accession))
        terms[protein.sequence].update(filter(None, listed.split(",")))
    for sequence, name in sorted(names.items(), key=lambda item: item[1]):
        label = enzyme_class(terms[sequence], ancestors)
        if label is not None:
            yield Example(name, sequence, label)
