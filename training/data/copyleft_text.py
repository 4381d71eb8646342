"""Long documents under the GNU General Public License, 72 million characters: a second source.

The Collaborative International Dictionary of English (GPL-2 or later), the documentation of the
Linux kernel (GPL-2) and An Anarchist FAQ (GPL-2). Who passes these texts on passes them on under
that licence, with its notices; `load_text` of `training.data.text` has texts without conditions.
"""

import gzip
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

from training.data.examples import Example, Splits, cached_splits, split_by_key
from training.data.registry import fetch_debian_package, package_files

DICTIONARY = (
    "dict-gcide",
    "0.48.5+nmu2",
    "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
)
LINUX = (
    "linux-doc-6.1",
    "6.1.176-1",
    "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
)
ANARCHIST_FAQ = (
    "anarchism",
    "15.3-3",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
)

# Earlier versions of sections F, H.5 and H.6, which repeat up to three fifths of their lines.
_DRAFTS = re.compile(r"append(13|41$|43$)")
# An entry begins after an empty line with its headword and the same in backslashes.
_ENTRY = re.compile(r"\n\n(?=\S[^\n]*\\)")


def load_copyleft_text() -> Splits:
    """Read the documents; their labels are the packages that they come from.

    A document is all entries of the dictionary whose headwords begin with the same two letters, an
    English page of the kernel's documentation, or a section of the FAQ. The hash of its name
    decides its split. Pages on one part of the kernel share phrases, across splits too.

    **Returns** The splits, about 80 % training, 10 % validation and 10 % test *by document*; they
    differ in characters. Names are two letters, or paths without ending.

    **Raises** OSError or ValueError, with what to do, if a package cannot be had.

    **Example**

    >>> load_copyleft_text()["train"][0].name  # doctest: +SKIP
    'ab'
    """

    def prepare() -> Splits:
        documents = (*_dictionary(), *linux_documents(), *_anarchist_faq())
        return split_by_key((document.name, document) for document in documents)

    return cached_splits("copyleft_text_1", prepare)


def linux_documents() -> Iterator[Example]:
    """Walk over the English pages of the kernel's documentation, by path.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had.

    **Example**

    >>> next(linux_documents()).name  # doctest: +SKIP
    'PCI/acpi-info'
    """
    files = dict(package_files(fetch_debian_package(*LINUX), "*/Documentation/*.rst.gz"))
    for path in sorted(files):
        name = path.partition("/Documentation/")[2].removesuffix(".rst.gz")
        if not name.startswith("translations/"):
            yield Example(name, gzip.decompress(files[path]).decode("utf-8"), LINUX[0])


def _dictionary() -> Iterator[Example]:
    package = fetch_debian_package(*DICTIONARY)
    ((_, content),) = package_files(package, "*/gcide.dict.dz")
    # Three of its bytes are no ASCII.
    text = gzip.decompress(content).decode("cp1252")
    entries = defaultdict(list)
    # Before the first entry stand the licence and the history, without one of their own.
    for entry in _ENTRY.split(text)[1:]:
        letters = "".join(filter(str.isalpha, entry.partition("\\")[0].lower()))
        entries[letters[:2]].append(entry)
    for letters, parts in entries.items():
        yield Example(letters, "\n\n".join(parts) + "\n", DICTIONARY[0])


def _anarchist_faq() -> Iterator[Example]:
    package = fetch_debian_package(*ANARCHIST_FAQ)
    for path, content in sorted(package_files(package, "*/markdown/*.md.gz")):
        name = PurePosixPath(path).name.removesuffix(".md.gz")
        if not _DRAFTS.match(name):
            yield Example(name, gzip.decompress(content).decode("utf-8"), ANARCHIST_FAQ[0])
