"""Read protein databases in version 4 of the BLAST format."""

import struct
from collections.abc import Iterator

import numpy as np

from training.data.fasta import Protein

# NCBIstdaa: the letter of each byte value.
_ALPHABET = "-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"
_LETTERS = bytes.maketrans(bytes(range(len(_ALPHABET))), _ALPHABET.encode("ascii"))
_VISIBLE_STRING = 0x1A


def read_blast_database(index: bytes, headers: bytes, sequences: bytes) -> Iterator[Protein]:
    """Walk over the proteins of a BLAST database.

    The first word of a header becomes the name, the rest the description.

    **Args**
        index: Content of the `.pin` file.
        headers: Content of the `.phr` file.
        sequences: Content of the `.psq` file.

    **Returns** The proteins, one at a time. Empty sequences are left out.

    **Raises** ValueError if the files are no version-4 protein database or do not fit together.

    **Example**

    >>> next(read_blast_database(pin, phr, psq)).name  # doctest: +SKIP
    'P12345'

    **Source** The layout is described in the NCBI C++ Toolkit's documentation of BLAST databases,
    version 4.
    """
    header_offsets, sequence_offsets = _offsets(index)
    if header_offsets[-1] > len(headers) or sequence_offsets[-1] > len(sequences):
        raise ValueError(
            "The files of the BLAST database do not fit together: the index points to "
            f"{header_offsets[-1]:,} header bytes and {sequence_offsets[-1]:,} sequence bytes. "
            f"Received: {len(headers):,} and {len(sequences):,}"
        )
    for i in range(len(header_offsets) - 1):
        # A zero byte stands between two sequences.
        residues = sequences[sequence_offsets[i] : sequence_offsets[i + 1] - 1]
        if residues:
            line = _definition(headers[header_offsets[i] : header_offsets[i + 1]])
            name, _, description = line.partition(" ")
            yield Protein(name, description, residues.translate(_LETTERS).decode("ascii"))


def _offsets(index: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the n + 1 offsets of the headers and of the sequences."""
    try:
        version, kind = struct.unpack_from(">ii", index, 0)
        if (version, kind) != (4, 1):
            raise ValueError(
                "A version-4 index of proteins was expected. "
                f"Received: version {version}, type {kind}"
            )
        place = 8
        for _ in range(2):  # Title and date.
            (length,) = struct.unpack_from(">i", index, place)
            place += 4 + length
        (count,) = struct.unpack_from(">i", index, place)
        place += 4 + 8 + 4  # The count, the number of residues and the longest sequence.
        tables = np.frombuffer(index, ">u4", 2 * (count + 1), place).astype("int64")
    except struct.error as error:
        raise ValueError(f"The index of the BLAST database is cut short: {error}.") from error
    return tables[: count + 1], tables[count + 1 :]


def _definition(header: bytes) -> str:
    """Return the first VisibleString of an ASN.1 header."""
    place = header.find(_VISIBLE_STRING)
    length = header[place + 1]
    place += 2
    if length & 0x80:  # The long form: the low bits count the bytes of the length.
        size = length & 0x7F
        length = int.from_bytes(header[place : place + size], "big")
        place += size
    return header[place : place + length].decode("ascii", "replace")
