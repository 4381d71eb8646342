"""Read sequences and secondary structure from a structure database of ProMod3."""

import struct
from collections.abc import Iterator

from training.data.examples import Example

_MAGIC, _VERSION = 1234, 2
# Places of the mask that says which properties are stored, and of the number of chains.
_STORED, _COUNT = 0x49, 0x4D
_ALL_STORED = -1
# What each array holds of a residue: its name and its bytes.
_ARRAYS = (
    ("sequence", 1),  # One letter.
    ("backbone", 24),  # Four atoms, three coordinates, int16.
    ("dihedrals", 4),  # Two angles, int16.
    ("depth", 2),
    ("accessibility", 2),
    ("secondary structure", 1),  # One letter of DSSP; C where DSSP leaves a blank.
    ("frequencies", 40),  # Of 20 residues, int16: two profiles.
    ("structure frequencies", 40),
)


def read_structure_database(content: bytes) -> Iterator[Example]:
    """Walk over the chains of a `structure_db.dat`.

    All numbers are little-endian, arrays begin with their length in int64. First come magic number
    and version (int32) and a record of the writer's types, which is passed over; then a mask of
    stored properties (int32), and the table of chains: the identifiers of entry and chain (each a
    length in int32, then letters), the place of the first residue in the arrays (int32), the
    number of residues, the number of the first one (int16), and a shift (three float32). Then come
    the arrays of `_ARRAYS`, each of all residues of all chains.

    **Returns** Chains, one at a time, named `1ABC_A`: residues as text, letters of DSSP as label.

    **Raises** ValueError if this is no such file, or it is cut short.

    **Example**

    >>> next(read_structure_database(content)).name  # doctest: +SKIP
    '12AS_A'

    **Source** Found from the file of Debian's promod3-data 3.2.1+ds-6, and tested on it.
    """
    try:
        magic, version = struct.unpack_from("<ii", content)
        (stored,) = struct.unpack_from("<i", content, _STORED)
        if (magic, version, stored) != (_MAGIC, _VERSION, _ALL_STORED):
            raise ValueError(
                "A structure database of version 2 with all properties was expected. "
                f"Received: magic number {magic}, version {version}, mask {stored}"
            )
        (count,) = struct.unpack_from("<q", content, _COUNT)
        place = _COUNT + 8
        chains = []
        for _ in range(count):
            entry, place = _text(content, place)
            chain, place = _text(content, place)
            first, length = struct.unpack_from("<IH", content, place)
            place += 4 + 2 + 2 + 12
            chains.append((f"{entry}_{chain}", first, length))
        arrays = {}
        for name, size in _ARRAYS:
            (residues,) = struct.unpack_from("<q", content, place)
            place += 8
            arrays[name] = content[place : place + residues] if size == 1 else b""
            place += residues * size
    except struct.error as error:
        raise ValueError(f"The structure database is cut short: {error}.") from error
    if place != len(content):
        raise ValueError(
            f"The structure database must end after {place:,} bytes. Received: {len(content):,}"
        )
    for name, first, length in chains:
        text, label = (
            arrays[array][first : first + length].decode("ascii")
            for array in ("sequence", "secondary structure")
        )
        yield Example(name, text, label)


def _text(content: bytes, place: int) -> tuple[str, int]:
    """Return a text with its length before it, and the place after it."""
    (length,) = struct.unpack_from("<i", content, place)
    place += 4
    return content[place : place + length].decode("ascii"), place + length
