import csv
import io
import re
import zipfile

import pytest

from training.data.antibodies import (
    CHAINS,
    load_antibodies,
    load_human_heavy_chains,
    read_package,
    split_rearrangements,
    translate,
)
from training.data.fasta import Protein

FRAME = "EVQLVESGGG" * 10 + "YYCAKD"  # the 106 places before the region
REGIONS = [
    "".join(letters) for letters in zip("ACDEFGHIKLMNPQRSTVWY", "YWVTSRQPNMLKIHGFEDCA", strict=True)
]


def aligned(region, frame=FRAME):
    return f"{frame}{region:-<32}WGQGTLVTVSS"


def write_wheel(path, rows, chain="vh"):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["seq_id", "input_seq", "aligned_seq", "score"])
    writer.writerows(rows)
    with zipfile.ZipFile(path, "w") as wheel:
        folder = "abnativ/model/percentiles"
        wheel.writestr(f"{folder}/test_{chain}_v2_abnativ_seq_scores.csv", file.getvalue())
        wheel.writestr(f"{folder}/test_other_v2_abnativ_seq_scores.csv", "seq_id\n")
    return path


def row(name, domain):
    return [name, domain.replace("-", ""), domain, "0.9"]


@pytest.mark.parametrize("chain", CHAINS)
def test_each_chain_has_its_file(chain, tmp_path):
    rows = [row("one", aligned("AR"))]
    train, heldout = read_package(write_wheel(tmp_path / "a.whl", rows, CHAINS[chain]), chain)
    assert train + heldout == [Protein("one", "", aligned("AR").replace("-", ""))]


def test_no_region_is_on_both_sides(tmp_path):
    frames = [FRAME, FRAME.replace("G", "A"), FRAME.replace("V", "I")]
    rows = [
        row(f"{region}{i}", aligned(region, frame))
        for region in REGIONS
        for i, frame in enumerate(frames)
    ]
    train, heldout = read_package(write_wheel(tmp_path / "a.whl", rows), "heavy")
    assert len(train) + len(heldout) == len(rows)
    regions = [{protein.name[:2] for protein in part} for part in (train, heldout)]
    assert regions[0] and regions[1] and not regions[0] & regions[1]
    # The split is for ever: figures depend on it.
    assert regions[1] == {"CW"}


def test_repeats_are_left_out(tmp_path):
    rows = [row("first", aligned("AR")), row("again", aligned("AR"))]
    train, heldout = read_package(write_wheel(tmp_path / "a.whl", rows), "heavy")
    assert [protein.name for protein in train + heldout] == ["first"]


@pytest.mark.parametrize("bad", [aligned("AR")[:-1], aligned("AR").replace("V", "-")])
def test_domains_that_are_not_aligned_are_refused(bad, tmp_path):
    wheel = write_wheel(tmp_path / "a.whl", [["one", aligned("AR").replace("-", ""), bad, "0.9"]])
    with pytest.raises(ValueError, match=r"AHo's numbering, of 149 places"):
        read_package(wheel, "heavy")


def test_another_chain_is_refused():
    with pytest.raises(ValueError, match="chain='kappa'"):
        load_antibodies("kappa")


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_the_package(chain):
    try:
        train, heldout = load_antibodies(chain)
    except OSError as error:
        pytest.skip(str(error))
    assert len(train) + len(heldout) == 50_000
    assert 4_500 < len(heldout) < 5_500
    assert all(90 < len(protein.sequence) < 142 for protein in train + heldout)
    assert set("".join(p.sequence for p in heldout)) == set("ACDEFGHIKLMNPQRSTVWY")


# Human heavy chains, as rearranged genes.

CODONS = {
    residue: codon
    for residue, codon in zip(
        "ACDEFGHIKLMNPQRSTVWY",
        re.findall("...", "GCCTGCGACGAGTTCGGCCACATCAAGCTGATGAACCCCCAGCGGAGCACCGTGTGGTAC"),
        strict=True,
    )
}
HEAD, TAIL = "EVQLVESGGG" * 9, "GQGTLVTVSS"


def gene(residues):
    return "".join(CODONS[residue] for residue in residues)


def rearranged(region, head=HEAD, tail=TAIL):
    """A row of the table, with a gap of two codons and a last base beyond them."""
    codons = gene(head)
    whole = f"{codons[:30]}......{codons[30:]}{gene('C' + region + 'W' + tail)}G"
    return region, whole, gene(f"C{region}W")


def test_genes_are_translated_without_their_gaps():
    train, heldout = split_rearrangements([rearranged("AR")])
    assert train + heldout == [Protein("AR", "", f"{HEAD}CARW{TAIL}")]
    # By the standard code, which is not read from ours.
    assert translate("ATGTTTTCATATCATCAACGTTGGAAA...TAC") == "MFSYHQRWKY"
    assert translate("TAATTT") is translate("TTTTGA") is None


@pytest.mark.parametrize(
    ("what", "row"),
    [
        ("a stop", ("x", *(part.replace("CGG", "TGA") for part in rearranged("AR")[1:]))),
        ("a missing start", rearranged("AR", head=HEAD[40:])),
        ("a gap at the start", ("x", "..." + rearranged("AR")[1], rearranged("AR")[2])),
        ("a missing end", rearranged("AR", tail=TAIL[:-2])),
        ("a frame shift", ("x", rearranged("AR")[1][1:], rearranged("AR")[2])),
        ("an unknown base", ("x", rearranged("AR")[1].replace("GTG", "GTN", 1), "TGCTGG")),
        ("another junction", ("x", rearranged("AR")[1], gene("CAKW"))),
        ("no junction", ("x", rearranged("AR")[1], gene("ARW"))),
    ],
)
def test_incomplete_genes_are_left_out(what, row):
    assert split_rearrangements([row]) == ([], []), what


def test_both_sets_are_split_alike_and_without_repeats(tmp_path):
    rows = [row(region, aligned(region)) for region in REGIONS]
    theirs = read_package(write_wheel(tmp_path / "a.whl", rows), "heavy")
    ours = split_rearrangements([rearranged(region) for region in [*REGIONS, *REGIONS]])
    for a, b in zip(ours, theirs, strict=True):
        assert [protein.name for protein in a] == [protein.name for protein in b]
    # A cysteine within the region does not end it.
    assert sum(map(len, split_rearrangements([rearranged("ACWCA")]))) == 1


@pytest.mark.slow
def test_the_human_package():
    try:
        train, heldout = load_human_heavy_chains()
        others = load_antibodies("heavy")
    except OSError as error:
        pytest.skip(str(error))
    assert (len(train), len(heldout)) == (14_359, 1_670)
    assert all(110 < len(protein.sequence) < 142 for protein in train + heldout)
    assert set("".join(p.sequence for p in heldout)) == set("ACDEFGHIKLMNPQRSTVWY")
    assert not {p.sequence for p in train} & {p.sequence for p in heldout + others[1]}
