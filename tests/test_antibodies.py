import csv
import io
import zipfile

import pytest

from training.data.antibodies import CHAINS, load_antibodies, read_package
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
