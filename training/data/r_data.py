"""Read the data that an R package carries in its lazy-load database."""

import gzip
import struct
import zlib
from typing import Any

# Of R's serialisation: the types that data sets of text are made of.
_NIL, _REFERENCE = 254, 255
_SYMBOL, _PAIRLIST, _CHARACTER = 1, 2, 9
_LOGICAL, _INTEGER, _REAL, _STRINGS, _LIST = 10, 13, 14, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


def read_r_database(index: bytes, blocks: bytes) -> dict[str, Any]:
    """Return the variables in the lazy-load database of an R package.

    The index (`Rdata.rdx`) is a gzip file with a serialised list whose `variables` say where each
    is in the other file (`Rdata.rdb`) and how long: its size, big-endian uint32, and a zlib stream
    with the serialised variable.

    **Returns** The variables by name: strings, numbers and lists of them; attributes but names are
    dropped.

    **Raises** ValueError if the files are damaged, or hold something that is no data.

    **Example**

    >>> read_r_database(rdx, rdb)["emma"][0]  # doctest: +SKIP
    'EMMA'

    **Source** The format is described in "R Internals", section "Serialization Formats".
    """
    try:
        places = _Reader(gzip.decompress(index)).value()["variables"]
        return {
            name: _Reader(zlib.decompress(blocks[place + 4 : place + size])).value()
            for name, (place, size) in places.items()
        }
    except (OSError, EOFError, zlib.error, struct.error, KeyError) as error:
        raise ValueError(
            f"This is no lazy-load database of R, or it is damaged: {error}."
        ) from error


class _Reader:
    """Walks over one serialised value: big-endian, version 2 or 3."""

    def __init__(self, content: bytes):
        self._content = content
        self._place = 0
        self._symbols: list[str] = []

    def value(self) -> Any:
        """Return the value."""
        if self._bytes(2) != b"X\n":
            raise ValueError("A value serialised by R in binary form was expected.")
        version, _, _ = self._numbers("i", 3)
        if version == 3:
            self._bytes(self._number())  # The name of the encoding.
        return self._item()

    def _bytes(self, count: int) -> bytes:
        self._place += count
        return self._content[self._place - count : self._place]

    def _numbers(self, kind: str, count: int) -> list[Any]:
        layout = f">{count}{kind}"
        return list(struct.unpack(layout, self._bytes(struct.calcsize(layout))))

    def _number(self) -> int:
        return self._numbers("i", 1)[0]

    def _item(self) -> Any:
        flags = self._number()
        kind = flags & 0xFF
        if kind == _NIL:
            return None
        if kind == _SYMBOL:
            self._symbols.append(self._item())
            return self._symbols[-1]
        if kind == _REFERENCE:
            return self._symbols[(flags >> 8) - 1]
        if kind == _CHARACTER:
            length = self._number()
            return None if length == -1 else self._bytes(length).decode("utf-8")
        if kind == _PAIRLIST:
            return self._pairs(flags)
        if kind in (_LOGICAL, _INTEGER):
            items = self._numbers("i", self._number())
        elif kind == _REAL:
            items = self._numbers("d", self._number())
        elif kind in (_STRINGS, _LIST):
            items = [self._item() for _ in range(self._number())]
        else:
            raise ValueError(f"Texts, numbers and lists of them are read. Received: R type {kind}")
        attributes = (self._item() or {}) if flags & _HAS_ATTRIBUTES else {}
        names = attributes.get("names")
        return dict(zip(names, items, strict=True)) if names else items

    def _pairs(self, flags: int) -> dict[str, Any]:
        pairs = {}
        while flags & 0xFF == _PAIRLIST:
            if flags & _HAS_ATTRIBUTES:
                self._item()
            name = self._item() if flags & _HAS_TAG else str(len(pairs))
            pairs[name] = self._item()
            flags = self._number()
        return pairs
