"""Read protein sequences from FASTA files."""

import gzip
import io
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# The 20 amino acids, X (any), B (D or N), Z (E or Q), J (I or L), U and O (the 21st and 22nd).
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYXBZJUO"

_GZIP_MAGIC = b"\x1f\x8b"
_FOREIGN = re.compile(f"[^{AMINO_ACIDS}]")


@dataclass(frozen=True, slots=True)
class Protein:
    """One record of a FASTA file.

    **Args**
        name: First word of the header, usually an accession; empty if the header is.
        description: Rest of the header.
        sequence: Upper-case amino-acid letters, at least one.
    """

    name: str
    description: str
    sequence: str


def read_fasta(path: str | os.PathLike[str]) -> list[Protein]:
    """Read all records of a FASTA file, plain or gzip, whatever its name ends in.

    Sequences may span lines. White space inside them and a `*` (stop) at their end are removed, and
    lower case becomes upper case. Nothing is skipped: what cannot be read is an error.

    **Args**
        path: The file.

    **Returns** The records in the order of the file, at least one.

    **Raises** FileNotFoundError if there is no such file. ValueError, with the file's name and the
    line, for a folder, an empty file, a file that is not FASTA or is cut short, a record without a
    sequence, and letters that are no amino acid.

    **Example**

    >>> read_fasta("proteins.fasta.gz")[0].sequence  # doctest: +SKIP
    'MKTAYIAKQR'
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder. Pass the path of one FASTA file.")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such file. Pass the path of a FASTA file, plain or gzip "
            f"(the current folder is {Path.cwd()})."
        )
    with path.open("rb") as file:  # once: a pipe cannot be read from its start again
        compressed = file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
        content = gzip.GzipFile(fileobj=file) if compressed else file
        # Headers may hold any text: a byte that is no UTF-8 is replaced, no letter of a sequence.
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", errors="replace")
        try:
            proteins = _parse(lines, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}: the gzip data is cut short or damaged ({error}). Copy or download the "
                "file again."
            ) from error
    if not proteins:
        raise ValueError(f"{path}: the file is empty. Pass a FASTA file with at least one record.")
    return proteins


def _parse(lines: Iterable[str], path: Path) -> list[Protein]:
    """Return the records in `lines`; see `read_fasta`."""
    proteins: list[Protein] = []
    header: str | None = None
    header_number = 0
    parts: list[str] = []
    stopped = False

    def finish() -> None:
        if header is None:
            return
        if not parts:
            raise ValueError(
                f"{path}, line {header_number}: the record {header[:60]!r} has no sequence. Add "
                "its sequence below the header, or remove the header."
            )
        name, _, description = header.partition(" ")
        proteins.append(Protein(name, description.strip(), "".join(parts)))

    for number, line in enumerate(lines, start=1):
        if line.startswith(">"):
            finish()
            header, header_number = " ".join(line[1:].split()), number
            parts, stopped = [], False
            continue
        residues = "".join(line.split()).upper()
        if not residues:
            continue
        if header is None:
            raise ValueError(_not_fasta(path, number, line))
        if stopped:
            raise ValueError(
                f"{path}, line {number}: the sequence goes on after a '*' (stop) in "
                f"{header[:60]!r}. Split the record there, or remove the '*'."
            )
        body = residues.rstrip("*")
        stopped = body != residues
        foreign = _FOREIGN.search(body)
        if foreign is not None:
            raise ValueError(_not_amino_acid(path, number, foreign.group(), header))
        if body:
            parts.append(body)
    finish()
    return proteins


def _not_fasta(path: Path, number: int, line: str) -> str:
    if "\0" in line or "\N{REPLACEMENT CHARACTER}" in line:
        advice = "It looks like binary data; if it is an archive, unpack it first (gzip is read)."
    else:
        advice = "A FASTA record is a line that starts with '>', then lines with the sequence."
    return (
        f"{path}, line {number}: this is not a FASTA file, there is text before the first '>': "
        f"{line.strip()[:40]!r}. {advice}"
    )


def _not_amino_acid(path: Path, number: int, letter: str, header: str) -> str:
    if letter in "-.":
        advice = "It marks a gap in an alignment: remove the gaps, or export unaligned sequences."
    elif letter == "*":
        advice = "A '*' (stop) may only end a sequence: split the record there, or remove it."
    else:
        advice = f"Sequences are made of the letters {AMINO_ACIDS}."
    return f"{path}, line {number}: {letter!r} in {header[:60]!r} is no amino acid. {advice}"
