"""Examples with and without labels: their splits, their cache, and a user's own files."""

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from training.data.registry import cache_folder, replacing

SPLITS = ("train", "validation", "test")
# Of a hundred parts by hash, those that each of validation and test gets.
HELDOUT_PERCENT = 10


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence or document.

    **Args**
        name: What the source calls it.
        text: Residues of a protein, or the text of a document.
        label: Name of the class, or one letter per residue; empty where the source has none.
    """

    name: str
    text: str
    label: str = ""


Splits = dict[str, list[Example]]


def hashed_percent(key: str) -> int:
    """Return a number from 0 to 99 that depends on the text only, the same on every machine.

    **Example**

    >>> hashed_percent("P12345")
    51
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100


def split_of(key: str) -> str:
    """Return the split that a key belongs to, by its hash: 10 % validation, 10 % test.

    What must not be torn apart (a family of proteins, the versions of an address) shares a key.

    **Example**

    >>> split_of("P12345")
    'train'
    """
    percent = hashed_percent(key)
    if percent < HELDOUT_PERCENT:
        return "test"
    return "validation" if percent < 2 * HELDOUT_PERCENT else "train"


def split_by_key(keyed: Iterable[tuple[str, Example]]) -> Splits:
    """Return the splits of pairs of key and example; see `split_of`.

    **Example**

    >>> split_by_key([("P12345", Example("a", "MK"))])["train"]
    [Example(name='a', text='MK', label='')]
    """
    splits: Splits = {name: [] for name in SPLITS}
    for key, example in keyed:
        splits[split_of(key)].append(example)
    return splits


def labels_of(examples: Iterable[Example]) -> list[str]:
    """Return the distinct labels in alphabetical order; a class's index is its place here."""
    return sorted({example.label for example in examples})


def texts_sha256(*parts: Sequence[str]) -> str:
    """Return a digest of the texts in each part, in order, which tells data sets apart.

    **Example**

    >>> texts_sha256(["MK"], ["MKT"]) == texts_sha256(["MK", "MKT"], [])
    False
    """
    digest = hashlib.sha256()
    for text in (text for part in parts for text in (*part, None)):
        # Lengths first, so that no text can look like two.
        digest.update(b"|" if text is None else f"{len(text)}:{text}".encode())
    return digest.hexdigest()


def columns_of(splits: Splits) -> list[list[str]]:
    """Return the texts and the labels of each split, for `texts_sha256`.

    **Example**

    >>> columns_of({"train": [Example("a", "MK", "x")]})
    [['MK'], ['x']]
    """
    return [
        [getattr(example, field) for example in examples]
        for examples in splits.values()
        for field in ("text", "label")
    ]


def cached_splits(name: str, prepare: Callable[[], Splits]) -> Splits:
    """Return prepared splits from the cache, or prepare them and fill it.

    **Args**
        name: Of the file, which must change when the outcome of `prepare` does.
        prepare: Called if the cache lacks the file.
    """
    path = cache_folder() / f"{name}.jsonl.gz"
    if not path.is_file():
        splits = prepare()
        with (
            replacing(path) as unfinished,
            gzip.open(unfinished, "wt", encoding="utf-8", compresslevel=3) as file,
        ):
            for split, examples in splits.items():
                file.writelines(json.dumps((split, *astuple(item))) + "\n" for item in examples)
        return splits
    splits = {split: [] for split in SPLITS}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            split, *fields = json.loads(line)
            splits[split].append(Example(*fields))
    return splits


def read_examples(
    path: str | os.PathLike[str], text_field: str = "text", label_field: str | None = None
) -> list[Example]:
    """Read a user's own documents.

    **Args**
        path: A `.jsonl` or `.csv` file (a header first) with an example in a line, a folder whose
            `.txt` files are documents, or a text file, which is one document. `.gz` may follow
            each ending. Text is UTF-8.
        text_field: The field or column with the text, in JSONL and CSV.
        label_field: The one with the label. Without it labels are empty.

    **Returns** The examples, at least one, named by file and line. Empty documents are left out.

    **Raises** FileNotFoundError if there is no such file. ValueError, with the file's name and the
    line, for what cannot be read.

    **Example**

    >>> read_examples("reviews.jsonl", label_field="stars")[0].label  # doctest: +SKIP
    '5'
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such file. Pass a text file, a folder of .txt files, a .jsonl "
            f"or a .csv file (the current folder is {Path.cwd()})."
        )
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.is_dir():
        files = sorted({*path.rglob("*.txt"), *path.rglob("*.txt.gz")})
        examples = [Example(str(file.relative_to(path)), _read(file)) for file in files]
    elif kind in (".jsonl", ".csv"):
        fields = (text_field, label_field) if label_field else (text_field,)
        examples = _jsonl(path, fields) if kind == ".jsonl" else _csv(path, fields)
    else:
        examples = [Example(path.name, _read(path))]
    if label_field and kind not in (".jsonl", ".csv"):
        raise ValueError(
            f"{path}: only JSONL and CSV files hold labels. Received: label_field={label_field!r}"
        )
    examples = [example for example in examples if example.text.strip()]
    if not examples:
        raise ValueError(f"{path}: there is no text in it. Pass at least one document.")
    return examples


def load_examples(
    path: str | os.PathLike[str], text_field: str = "text", label_field: str | None = None
) -> Splits:
    """Read a user's own documents and split them by the hash of their text.

    A single document is cut instead: its first 80 % of lines are for training, the next 10 % for
    validation, the last for the test. See `read_examples` for the arguments and errors.

    **Raises** ValueError as well if a split stays empty.

    **Example**

    >>> load_examples("books/")["train"]  # doctest: +SKIP
    """
    examples = read_examples(path, text_field, label_field)
    if len(examples) == 1:
        lines = examples[0].text.splitlines(keepends=True)
        first, second = len(lines) * 8 // 10, len(lines) * 9 // 10
        parts = (lines[:first], lines[first:second], lines[second:])
        texts = ("".join(part) for part in parts)
        splits = {
            split: [Example(examples[0].name, text, examples[0].label)] if text.strip() else []
            for split, text in zip(SPLITS, texts, strict=True)
        }
    else:
        splits = split_by_key((example.text, example) for example in examples)
    for split, part in splits.items():
        if not part:
            raise ValueError(
                f"{path}: {len(examples)} documents are too few, none falls into the {split} "
                "split. Pass some dozens, or one document of at least ten lines."
            )
    return splits


def _read(path: Path) -> str:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is no UTF-8 text ({error}). Convert it first.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: the gzip data is cut short or damaged ({error}).") from error


def _jsonl(path: Path, fields: tuple[str, ...]) -> list[Example]:
    examples = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: this is no JSON ({error}).") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: an object was expected. Received: {line[:40]!r}")
            examples.append(_example(where, f"{path.name}:{number}", record, fields))
    return examples


def _csv(path: Path, fields: tuple[str, ...]) -> list[Example]:
    csv.field_size_limit(2**31 - 1)  # Documents are long.
    rows = csv.DictReader(io.StringIO(_read(path)))
    return [
        _example(f"{path}, line {rows.line_num}", f"{path.name}:{rows.line_num}", row, fields)
        for row in rows
    ]


def is_text(value: str) -> bool:
    r"""Return whether a string has an encoding: JSON may hold halves of surrogate pairs.

    **Example**

    >>> is_text("\U0001f9ec"), is_text("\ud83e")
    (True, False)
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _example(where: str, name: str, record: dict, fields: tuple[str, ...]) -> Example:
    values = []
    for field in fields:
        value = record.get(field)
        if not isinstance(value, str | int | float):
            known = ", ".join(map(repr, record))
            raise ValueError(
                f"{where}: there must be a text or number in {field!r}. Received: {value!r} "
                f"(there are {known})"
            )
        if not str(value).strip():
            raise ValueError(f"{where}: {field!r} is blank. Fill it in, or remove the record.")
        if not is_text(str(value)):
            raise ValueError(
                f"{where}: {field!r} holds half of a surrogate pair, which is no character: mend "
                f"it, or remove the record. Received: {str(value)[:60]!a}"
            )
        values.append(str(value))
    return Example(name, *values)
