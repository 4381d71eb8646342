import gzip
import json
from itertools import chain

import pytest

from training.data.examples import (
    SPLITS,
    Example,
    cached_splits,
    labels_of,
    load_examples,
    read_examples,
    split_by_key,
    split_of,
)


def test_splits_are_fixed_and_have_their_shares():
    keys = [f"P{i}" for i in range(10_000)]
    counts = {split: sum(split_of(key) == split for key in keys) for split in SPLITS}
    # Within five standard deviations of a binomial draw.
    assert abs(counts["train"] - 8000) < 5 * 40
    assert abs(counts["validation"] - 1000) < 5 * 30
    assert abs(counts["test"] - 1000) < 5 * 30
    # The first eight bytes of their SHA-256 are 51, 3 and 12 modulo 100.
    assert [split_of(key) for key in ("P12345", "P0", "P30")] == ["train", "test", "validation"]


def test_what_shares_a_key_is_not_torn_apart():
    examples = [Example(f"{i}", "MK", "c") for i in range(300)]
    splits = split_by_key((f"family {int(e.name) // 3}", e) for e in examples)
    assert sorted(chain(*splits.values()), key=lambda e: int(e.name)) == examples
    families = [{int(e.name) // 3 for e in part} for part in splits.values()]
    assert sum(map(len, families)) == 100 == len(set.union(*families))


def test_prepared_splits_are_prepared_once_and_come_back(cache):
    calls = []
    whole = {
        "train": [Example("a", "line\none\u2028\U0001f600", "x"), Example("b", "t")],
        "validation": [],
        "test": [Example("c", "", "y")],
    }

    def prepare():
        calls.append(1)
        return whole

    for _ in range(3):
        assert cached_splits("some", prepare) == whole
    assert calls == [1]
    assert [path.name for path in cache.iterdir()] == ["some.jsonl.gz"]


def test_labels_are_in_order():
    assert labels_of([Example("", "", "b"), Example("", "", "a"), Example("", "", "b")]) == [
        "a",
        "b",
    ]


RECORDS = [{"text": 'one\ntwo, "three"', "kind": 3, "other": None}, {"text": "four", "kind": "x"}]


def write_jsonl(path, records):
    text = "\ufeff" + "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_jsonl(tmp_path, name):
    path = write_jsonl(tmp_path / name, RECORDS)
    labelled = read_examples(path, label_field="kind")
    assert [(e.text, e.label) for e in labelled] == [('one\ntwo, "three"', "3"), ("four", "x")]
    assert [e.name for e in labelled] == [f"{name}:1", f"{name}:3"]
    assert [(e.text, e.label) for e in read_examples(path, "kind")] == [("3", ""), ("x", "")]


def test_csv(tmp_path):
    # More than Python's reader takes by itself, and a line separator that ends no row.
    long = "z" * 200_000 + "\u2028z"
    path = tmp_path / "x.csv"
    path.write_text(f'id,text,kind\n1,"one\ntwo, ""three""",a\n2,{long},b\n', encoding="utf-8")
    examples = read_examples(path, label_field="kind")
    assert [(e.text, e.label) for e in examples] == [('one\ntwo, "three"', "a"), (long, "b")]


def test_a_folder_and_a_file_of_text(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "deep" / "a.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "a.bin").write_bytes(b"\xff")
    assert [e.text for e in read_examples(tmp_path)] == ["first", "second", "third"]
    assert read_examples(tmp_path / "b.txt") == [Example("b.txt", "second")]


@pytest.mark.parametrize(
    "name, content, arguments, message",
    [
        ("x.jsonl", b'{"text": "a"}\n{"text":', {}, "line 2: this is no JSON"),
        ("x.jsonl", b'"a"\n', {}, "line 1: an object was expected"),
        ("x.jsonl", b'{"body": "a"}\n', {}, "line 1: .*'text'.*there are 'body'"),
        ("x.jsonl", b'{"text": null}\n', {}, "line 1: .*'text'.*Received: None"),
        ("x.csv", b"text,b\na\n", {"label_field": "b"}, "line 2: .*'b'"),
        ("x.csv", b"text,b\na, \n", {"label_field": "b"}, "line 2: 'b' is blank"),
        ("x.jsonl", b'{"text": "a\\ud83e"}', {}, "line 1: 'text' holds half of a surrogate pair"),
        ("x.csv", b"", {}, "no text in it"),
        ("x.txt", b"\xff\xfe", {}, "no UTF-8"),
        ("x.txt", b"a", {"label_field": "b"}, "only JSONL and CSV files hold labels"),
        ("x.txt.gz", gzip.compress(b"a" * 99)[:-9], {}, "cut short or damaged"),
        # Ten bytes of header, then one that no compressed block begins with.
        ("x.txt.gz", gzip.compress(b"a")[:10] + b"\xff" * 9, {}, "cut short or damaged"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, arguments, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_examples(path, **arguments)
    assert str(path) in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no such file.*\.jsonl"):
        read_examples(tmp_path / "nothing.txt")


def test_users_documents_are_split_by_their_text(tmp_path):
    records = [{"text": f"document {i % 60}", "n": i} for i in range(120)]
    splits = load_examples(write_jsonl(tmp_path / "x.jsonl", records), label_field="n")
    assert sum(map(len, splits.values())) == 120
    texts = [{e.text for e in part} for part in splits.values()]
    assert sum(map(len, texts)) == 60  # The same text is in one split.
    with pytest.raises(ValueError, match=r"2 documents are too few"):
        load_examples(write_jsonl(tmp_path / "y.jsonl", records[:2]))


def test_a_single_document_is_cut_in_order(tmp_path):
    lines = [f"{i}\n" for i in range(50)]
    (tmp_path / "x.txt").write_text("".join(lines), encoding="utf-8")
    splits = load_examples(tmp_path / "x.txt")
    texts = ["".join(e.text for e in splits[split]) for split in SPLITS]
    assert texts == ["".join(lines[:40]), "".join(lines[40:45]), "".join(lines[45:])]
    (tmp_path / "y.txt").write_text("one line", encoding="utf-8")
    with pytest.raises(ValueError, match="at least ten lines"):
        load_examples(tmp_path / "y.txt")
