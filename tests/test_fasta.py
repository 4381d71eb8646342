import gzip
import hashlib
import os
import threading

import pytest

from training.data import build_protein_sample
from training.data.examples import Example
from training.data.fasta import Protein, read_fasta
from training.data.protein_sample import (
    LOCALISATIONS,
    SAMPLE_PATH,
    SAMPLE_SHA256,
    load_protein_sample,
    localisation,
)

TEXT = ">P1 first protein\nMKTAY\nIAKQR\n\n>P2\nacdxbzuoj\n"
PROTEINS = [Protein("P1", "first protein", "MKTAYIAKQR"), Protein("P2", "", "ACDXBZUOJ")]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.removesuffix("\n"),
        "\ufeff" + TEXT,
        "\n  \n" + TEXT,
        TEXT.replace("IAKQR", "IA kq\tr *"),
        TEXT.replace("IAKQR", "IAKQR\n*"),
        TEXT.replace(" first", "\tfirst "),
    ],
)
def test_reads_every_way_of_writing_the_same_records(tmp_path, content):
    assert read_fasta(write(tmp_path / "p.fasta", content)) == PROTEINS


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    assert read_fasta(write(tmp_path / "p.fasta", gzip.compress(TEXT.encode()))) == PROTEINS
    assert read_fasta(write(tmp_path / "p.fasta.gz", TEXT)) == PROTEINS
    assert read_fasta(str(tmp_path / "p.fasta.gz")) == PROTEINS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_pipe_is_read_once(tmp_path, pack):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[pack(TEXT.encode())])
    writer.start()
    assert read_fasta(pipe) == PROTEINS
    writer.join()


def test_headers_may_hold_any_text(tmp_path):
    (protein,) = read_fasta(write(tmp_path / "p.fasta", ">Q9 prot\xe9ine\nMK\n".encode("latin-1")))
    assert (protein.name, protein.sequence) == ("Q9", "MK")
    assert read_fasta(write(tmp_path / "p.fasta", ">\nMK\n")) == [Protein("", "", "MK")]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (gzip.compress(b""), "is empty"),
        ("MKTAY\n>P1\nMK\n", r"line 1: this is not a FASTA file.*'MKTAY'"),
        ("\nname,sequence\nP1,MKTAY\n", r"line 2: this is not a FASTA file"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"line 1: .*binary"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0", r"line 1: .*binary"),
        (">P1\n>P2\nMK\n", r"line 1: the record 'P1' has no sequence"),
        (">P1\nMK\n>P2 last\n\n", r"line 3: the record 'P2 last' has no sequence"),
        (">P1\n*\n", r"line 1: the record 'P1' has no sequence"),
        (">P1\nMKT\nAY1K\n", r"line 3: '1' in 'P1'"),
        (">P1\nMK-T\n", r"line 2: '-' in 'P1'.*gap"),
        (">P1\nMK.T\n", r"line 2: '\.' in 'P1'.*gap"),
        (">P1\nMK*T\n", r"line 2: '\*' in 'P1'.*stop"),
        (">P1\nMKT*\nAY\n", r"line 3: the sequence goes on after a '\*'"),
        (">P1\nMK\xc4T\n", r"line 2: .* in 'P1' is no amino acid"),
    ],
)
def test_what_cannot_be_read_names_file_line_and_reason(tmp_path, content, message):
    path = write(tmp_path / "proteins.txt", content)
    with pytest.raises(ValueError, match=message) as error:
        read_fasta(path)
    assert str(path) in str(error.value)


def test_gzip_that_is_cut_short_or_damaged(tmp_path):
    whole = gzip.compress(
        ("".join(f">P{i}\nMKTAYIAKQR{'ACDEF'[i % 5]}\n" for i in range(999))).encode()
    )
    path = write(tmp_path / "p.gz", whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"p\.gz: the gzip data is cut short or damaged"):
        read_fasta(path)
    middle = len(whole) // 2
    write(path, whole[:middle] + bytes(8) + whole[middle + 8 :])
    with pytest.raises(ValueError, match=r"p\.gz"):
        read_fasta(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.fasta: there is no such file"):
        read_fasta(tmp_path / "nothing.fasta")
    with pytest.raises(ValueError, match="is a folder"):
        read_fasta(tmp_path)


def test_the_shipped_sample_is_what_was_built():
    assert SAMPLE_PATH.stat().st_size < 1.9e6
    assert hashlib.sha256(gzip.decompress(SAMPLE_PATH.read_bytes())).hexdigest() == SAMPLE_SHA256
    train, heldout = load_protein_sample()
    assert (len(train), len(heldout)) == (5494, 511)
    sequences = [protein.sequence for protein in train + heldout]
    assert len(set(sequences)) == len(sequences)
    assert {localisation(protein) for protein in train} == set(LOCALISATIONS)
    with pytest.raises(ValueError, match=r"localisation="):
        localisation(PROTEINS[0])


def test_the_build_draws_without_repeats():
    sequences = ["MEEE", "MCCC", "MEEE", "MAAA"]
    train = [Example(f"P{9 - i}", sequence, "CYT") for i, sequence in enumerate(sequences)]
    drawn = build_protein_sample.draw(train)
    assert drawn == {"P7": ("MEEE", "CYT"), "P8": ("MCCC", "CYT"), "P6": ("MAAA", "CYT")}


def test_the_build_finds_near_relatives_of_heldout_proteins():
    rows = {
        "held": ("ACDEFGHIKLMNPQRSTVWY" * 2, "CYT"),
        "fragment": ("ACDEFGHIKLMN", "CYT"),
        "reversed": ("ACDEFGHIKLMNPQRSTVWY"[::-1] * 2, "CYT"),
    }
    assert build_protein_sample.relatives(rows, {"held"}) == {"fragment"}
