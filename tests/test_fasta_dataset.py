import importlib
import random
import re

import pytest

from training.data.documents import load_tfds
from training.data.examples import SPLITS, split_of

tfds = pytest.importorskip("tensorflow_datasets", reason="no tensorflow-datasets here")
fasta_dataset = importlib.import_module("training.data.fasta_dataset").fasta_dataset


@pytest.fixture
def fasta(tmp_path):
    draw = random.Random(0)
    lines = [f">p{i} about {i}\n{''.join(draw.choices('ACDEFGHIK', k=9))}\n" for i in range(90)]
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def read(builder):
    builder.download_and_prepare()
    source = builder.as_data_source()
    return {
        split: [{k: v.decode() for k, v in row.items()} for row in source[split]]
        for split in builder.info.splits
    }


def test_every_protein_is_in_the_split_of_its_sequence(fasta, tmp_path):
    splits = read(fasta_dataset(fasta, data_dir=tmp_path / "tfds", file_format="array_record"))
    assert sorted(splits) == sorted(SPLITS)
    rows = [row for split in SPLITS for row in splits[split]]
    assert sorted(row["name"] for row in rows) == sorted(f"p{i}" for i in range(90))
    assert all(row["description"] == f"about {row['name'][1:]}" for row in rows)
    assert all(split_of(row["sequence"]) == split for split in SPLITS for row in splits[split])


@pytest.mark.parametrize("name", ["{}", "sp|{}|X_HUMAN", "gnl|db|{}"])
def test_clusters_stay_whole(name, fasta, tmp_path):
    text = re.sub(r">(p\d+)", lambda match: ">" + name.format(match[1]), fasta.read_text("utf-8"))
    fasta.write_text(text, encoding="utf-8")
    clusters = tmp_path / "clusters.tsv"
    table = "".join(f"p{i // 3 * 3}\tp{i}\n" for i in range(90))
    clusters.write_text(table, encoding="utf-8")
    options = {"data_dir": tmp_path / "tfds", "file_format": "array_record"}
    splits = read(fasta_dataset(fasta, clusters, **options))
    for split in SPLITS:
        names = [int(row["description"].removeprefix("about ")) for row in splits[split]]
        assert names and all(split_of(f"p{i // 3 * 3}") == split for i in names)
    clusters.write_text(table.replace("p3\tp4\n", ""), encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"must be in a cluster.*'{re.escape(name.format('p4'))}'"
    ):
        read(fasta_dataset(fasta, clusters, **options))


def test_a_changed_file_is_prepared_anew_and_the_same_one_is_not(fasta, tmp_path):
    first = fasta_dataset(fasta, data_dir=tmp_path / "tfds")
    first.download_and_prepare()
    assert fasta_dataset(fasta, data_dir=tmp_path / "tfds").data_path.exists()
    fasta.write_text(fasta.read_text(encoding="utf-8") + ">more\nMK\n", encoding="utf-8")
    changed = fasta_dataset(fasta, data_dir=tmp_path / "tfds")
    assert not changed.data_path.exists()
    changed.download_and_prepare()
    assert sum(split.num_examples for split in changed.info.splits.values()) == 91


def test_what_cannot_be_split_is_told(tmp_path):
    path = tmp_path / "few.fasta"
    path.write_text(">a\nMK\n>b\nMK\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"few\.fasta: 2 proteins in 1 groups are too few"):
        fasta_dataset(path, data_dir=tmp_path / "tfds").download_and_prepare()
    with pytest.raises(FileNotFoundError):
        fasta_dataset(tmp_path / "nothing.fasta")


def test_a_prepared_set_is_read_as_documents(fasta, tmp_path, monkeypatch):
    builder = fasta_dataset(fasta, data_dir=tmp_path / "tfds")
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    splits = load_tfds("proteins", text_field="sequence", label_field="name")
    assert sorted(e.label for split in SPLITS for e in splits[split]) == sorted(
        f"p{i}" for i in range(90)
    )
    assert all(split_of(e.text) == split for split in SPLITS for e in splits[split])
