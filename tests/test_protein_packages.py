import gzip
import os
import struct

import pytest

from training.data import protein_packages, protein_sources
from training.data.blast_database import read_blast_database
from training.data.fasta import Protein

ALPHABET = "-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"
PROTEINS = [
    Protein("P1|GO:1,GO:2", "the first", "MKTAYIAKQR"),
    Protein("P2|GO:3", "x" * 300, "ACDEFGHIKLMNPQRSTVWYXBZUOJ"),
    Protein("P3|", "", "W"),
]

needs_posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")


def write_blast_database(proteins):
    """The three files of a version-4 database, (pin, phr, psq)."""
    headers, sequences = b"", b"\0"
    header_offsets, sequence_offsets = [0], [1]
    for protein in proteins:
        line = f"{protein.name} {protein.description}".strip().encode()
        size = bytes([len(line)]) if len(line) < 128 else b"\x82" + struct.pack(">H", len(line))
        headers += b"0\x800\x80\xa0\x80\x1a" + size + line + bytes(4)
        sequences += bytes(ALPHABET.index(letter) for letter in protein.sequence) + b"\0"
        header_offsets.append(len(headers))
        sequence_offsets.append(len(sequences))
    title, date = b"made up", b"today"
    index = struct.pack(">iii", 4, 1, len(title)) + title + struct.pack(">i", len(date)) + date
    index += struct.pack(">i", len(proteins)) + struct.pack("<q", len(sequences))
    index += struct.pack(">i", max(len(p.sequence) for p in proteins))
    for offsets in (header_offsets, sequence_offsets):
        index += struct.pack(f">{len(offsets)}I", *offsets)
    return index, headers, sequences


def files_of(proteins):
    return zip(("pin", "phr", "psq"), write_blast_database(proteins), strict=True)


def stand_in(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


def test_a_blast_database_comes_back():
    assert list(read_blast_database(*write_blast_database(PROTEINS))) == PROTEINS


def test_empty_sequences_are_left_out():
    proteins = [PROTEINS[0], Protein("empty", "", ""), PROTEINS[2]]
    found = list(read_blast_database(*write_blast_database(proteins)))
    assert found == [PROTEINS[0], PROTEINS[2]]


@pytest.mark.parametrize("damage", ["nucleotides", "version", "short", "other sequences"])
def test_what_is_no_blast_database_is_refused(damage):
    index, headers, sequences = write_blast_database(PROTEINS)
    if damage == "nucleotides":
        index = index[:4] + struct.pack(">i", 0) + index[8:]
    if damage == "version":
        index = struct.pack(">i", 5) + index[4:]
    if damage == "short":
        index = index[:20]
    if damage == "other sequences":
        sequences = sequences[:-5]
    message = "version-4|cut short|do not fit together"
    with pytest.raises(ValueError, match=message):
        list(read_blast_database(index, headers, sequences))


@needs_posix
def test_metastudent_is_prepared_once(cache, tmp_path, monkeypatch):
    """The stand-in for mmseqs puts P1 into the cluster of P0."""
    parts = {
        "MFO": [PROTEINS[0], Protein("P0|GO:4", "", PROTEINS[1].sequence)],
        "BPO": [PROTEINS[1]],
        "CCO": [PROTEINS[2]],
    }
    files = [
        (f"usr/share/data/{folder}/goasp.fasta.{ending}", content)
        for folder, proteins in parts.items()
        for ending, content in files_of(proteins)
    ]
    fetched = []
    monkeypatch.setattr(protein_packages, "package_files", lambda package, *patterns: iter(files))
    monkeypatch.setattr(protein_packages, "fetch_debian_package", lambda *a: fetched.append(a))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="Install the package mmseqs2"):
        protein_packages.load_metastudent()
    assert fetched == []
    table = r"P3\tP3\nP0\tP0\nP0\tP1\n"
    stand_in(tmp_path / "bin", "mmseqs", f"printf '{table}' > clusters_cluster.tsv")
    expected = [Protein("P0", "", PROTEINS[1].sequence), Protein("P3", "", "W")]
    for _ in range(2):
        assert protein_packages.load_metastudent() == expected
    assert len(fetched) == 1
    assert len(list(cache.iterdir())) == 1


@needs_posix
def test_failing_clustering_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    files = [
        (f"x/{folder}/goasp.fasta.{ending}", content)
        for folder in ("MFO", "BPO", "CCO")
        for ending, content in files_of(PROTEINS)
    ]
    monkeypatch.setattr(protein_packages, "package_files", lambda package, *patterns: iter(files))
    monkeypatch.setattr(protein_packages, "fetch_debian_package", lambda *a: None)
    stand_in(tmp_path / "bin", "mmseqs", "echo out of memory >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="out of memory"):
        protein_packages.load_metastudent()
    assert list(cache.iterdir()) == []


def test_the_examples_are_taken_from_their_package(cache, monkeypatch):
    text = gzip.compress(b">P1 first\nMKTAYI\n")
    folder = "usr/share/doc/mmseqs2/example-data"
    files = [("usr/share/doc/other", b""), (f"{folder}/DB.fasta.gz", text)]
    monkeypatch.setattr(protein_packages, "package_files", lambda package, *patterns: iter(files))
    monkeypatch.setattr(protein_packages, "fetch_debian_package", lambda *a: None)
    for _ in range(2):
        assert protein_packages.load_mmseqs2_examples() == [Protein("P1", "first", "MKTAYI")]


def test_pretraining_leaves_out_what_localisation_is_scored_on(monkeypatch):
    """By accession, whatever its sequence, and by sequence, whatever its accession."""
    proteins = [Protein(name, "", sequence) for name, sequence in zip("ABC", "KLM", strict=True)]
    heldout = [Protein("A", "", "W"), Protein("Z", "", "L")]
    monkeypatch.setattr(protein_sources, "load_metastudent", lambda: proteins)
    monkeypatch.setattr(protein_sources, "localisation_heldout", lambda: heldout)
    assert protein_sources.metastudent_for_pretraining() == proteins[2:]
    assert protein_sources.PACKAGES["metastudent"] is protein_sources.metastudent_for_pretraining
    names = ("sp|A|A_HUMAN", "tr|B|B_HUMAN", "tr|C|C_HUMAN")
    proteins = [Protein(name, "", sequence) for name, sequence in zip(names, "KLM", strict=True)]
    monkeypatch.setattr(protein_sources, "load_mmseqs2_examples", lambda: proteins)
    assert protein_sources.PACKAGES["mmseqs2_examples"]() == proteins[2:]
