"""Read the texts of compressed modules of the SWORD project: Bibles and commentaries."""

import html
import re
import struct
import zlib
from collections.abc import Iterator

from training.data.examples import Example

# Footnotes stand in the middle of sentences.
_NOTE = re.compile(r"<note\b.*?</note>", re.DOTALL)
# What begins a new line: paragraphs, headings, lines of verse, rows and items.
_BREAK = re.compile(r"<(?:div|/?title|lb|l|/?lg|/?row|/?item|chapter)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
_BLANK = re.compile(r"[ \t\r\n]*\n[ \t\r\n]*")
_IDENTIFIER = re.compile(r'<(?:div|chapter)\b[^>]*\bosisID="([^"]+)"')


def read_sword_module(index: bytes, blocks: bytes) -> Iterator[Example]:
    r"""Walk over the compressed blocks of one testament of a zText, zCom or zCom4 module.

    What a block holds is the module's choice: a chapter or a book. The index (`.bzs`, `.czs`) has
    three little-endian uint32 for each block: its place in the other file (`.bzz`, `.czz`), its
    compressed size, and its size; a block is a zlib stream of OSIS markup. Which verse is where
    (`.bzv`, `.czv`) is not needed for the running text.

    Of the markup, footnotes are left out, and paragraphs, headings and lines become lines.

    **Returns** The text of each block that has some, named by its first OSIS identifier, such as
    `Mark` or `Ps.3`.

    **Raises** ValueError if the files do not fit together or are no such module.

    **Example**

    >>> block = '<div osisID="Mark" type="book"/><title>St. Mark</title>The beginning'
    >>> packed = zlib.compress(block.encode())
    >>> next(read_sword_module(struct.pack("<III", 0, len(packed), len(block)), packed)).text
    'St. Mark\nThe beginning\n'

    **Source** Found from the files of Debian's sword-text-kjv 14.3, sword-comm-mhcc 2.0 and
    sword-comm-tdavid 2.1, and tested on them.
    """
    if len(index) % 12:
        raise ValueError(
            "The index of a SWORD module must have 12 bytes for each block. "
            f"Received: {len(index):,} bytes"
        )
    for place, packed, size in struct.iter_unpack("<III", index):
        try:
            markup = zlib.decompress(blocks[place : place + packed])
        except zlib.error as error:
            raise ValueError(
                f"The blocks of the SWORD module do not fit its index, or are damaged: {error}."
            ) from error
        if len(markup) != size:
            raise ValueError(
                f"A block of the SWORD module must hold {size:,} bytes. Received: {len(markup):,}"
            )
        document = markup.decode("utf-8")
        text = plain_text(document)
        if text:
            identifier = _IDENTIFIER.search(document)
            yield Example(identifier[1] if identifier else f"block {place}", text)


def plain_text(markup: str) -> str:
    r"""Return the text of OSIS markup, a line for each paragraph, heading and line of verse.

    **Example**

    >>> plain_text('A <w lemma="x">word</w> &amp;<note>see</note> more.<lb/>End')
    'A word & more.\nEnd\n'
    """
    text = _BREAK.sub("\n", _NOTE.sub("", markup))
    text = html.unescape(_TAG.sub("", text))
    text = _BLANK.sub("\n", re.sub(r"[ \t]+", " ", text)).strip()
    return text + "\n" if text else ""
