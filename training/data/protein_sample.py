"""The proteins that the repository ships; where they come from is in sample/ATTRIBUTION.md."""

from pathlib import Path

from training.data.fasta import Protein, read_fasta

SAMPLE_PATH = Path(__file__).parent / "sample" / "proteins.fasta.gz"
# Of the FASTA text, not of the gzip file around it: compressors differ.
SAMPLE_SHA256 = "c77dfb2156dd575ddc04cc631591c164a0fd093a0be842154808848585dfd77c"

# The 13 classes of the data set: nine single locations, four combinations.
LOCALISATIONS = {
    "CYT": "Cytoplasm",
    "ER": "ER",
    "MEM": "Membrane",
    "MIT": "Mitochondrion",
    "NUC": "Nucleus",
    "PER": "Peroxisome",
    "PLA": "Plastid",
    "SEC": "Secreted",
    "CEP": "Cell projection",
    "CYT;NUC": "Cytoplasm;Nucleus",
    "CEN;CYT;CYTS;MTOC": "Centrosome;Cytoplasm;Cytoskeleton;Microtubule organizing center",
    "CYT;MEM": "Cytoplasm;Membrane",
    "CYT;CYTS": "Cytoplasm;Cytoskeleton",
}


def load_protein_sample() -> tuple[list[Protein], list[Protein]]:
    """Read the shipped sample.

    **Returns** The training proteins and the held-out proteins, with accessions as names. The same
    sequence occurs once, and no training protein is a near relative of a held-out one.

    **Raises** FileNotFoundError or ValueError if the file is missing or damaged.

    **Example**

    >>> train, heldout = load_protein_sample()
    >>> len(train) > 10 * len(heldout)
    True
    """
    train: list[Protein] = []
    heldout: list[Protein] = []
    parts = {"train": train, "heldout": heldout}
    for protein in read_fasta(SAMPLE_PATH):
        parts[_field(protein, "split")].append(protein)
    return train, heldout


def localisation(protein: Protein) -> str:
    """Return the class of a protein of the sample, one of the keys of `LOCALISATIONS`."""
    return _field(protein, "localisation")


def _field(protein: Protein, name: str) -> str:
    for field in protein.description.split():
        key, _, value = field.partition("=")
        if key == name:
            return value
    raise ValueError(
        f"The header of {protein.name!r} must hold `{name}=...`, as in the shipped sample. "
        f"Received: {protein.description!r}"
    )
