import io
import itertools
import json
import os
import re
import struct
import tarfile
import zipfile

import pytest
from test_protein_packages import stand_in, write_blast_database

from training.data import enzyme_class, localisation, peptides, registry, secondary_structure
from training.data.clusters import cluster_proteins, read_clusters
from training.data.examples import SPLITS, Example, split_of
from training.data.fasta import Protein
from training.data.structure_database import read_structure_database

needs_posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")

CHAINS = [
    Example("1ABC_A", "MKTAY", "CHHHT"),
    Example("2XYZ_B", "ACDEFGHIK", "CEEEEBSGI"),
    Example("0DUP_C", "MKTAY", "CHHHC"),
]


def write_localisation(path, sequences, places):
    rows = "".join(f"P{i},{sequence},{i % 2}\n" for i, sequence in enumerate(sequences))
    names = {"0": "Cytoplasm", "1": "Cytoplasm;Nucleus"}
    files = {
        "scl2205.csv": f"entry,seq,scl\n{rows}",
        "splits.json": json.dumps(places),
        "labels.json": json.dumps({"index_to_label": names}),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"p_scldata-2026.2.0/scldata/data/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_localisation_keeps_the_given_splits_and_drops_leaks(cache, tmp_path, monkeypatch):
    sequences = ["MAAA", "MCCC", "MDDD", "MAAA", "MEEE", "MDDD"]
    places = {"trn": [5, 1, 4, 3], "vld": [0], "tst": [2], "cv": {}}
    package = write_localisation(tmp_path / "x.tar.gz", sequences, places)
    monkeypatch.setattr(localisation, "fetch_python_package", lambda *a, source: package)
    # P5 is in the test split too and P3 in the validation split, as sequences.
    assert localisation.load_localisation() == {
        "train": [Example("P1", "MCCC", "CYT;NUC"), Example("P4", "MEEE", "CYT")],
        "validation": [Example("P0", "MAAA", "CYT")],
        "test": [Example("P2", "MDDD", "CYT")],
    }
    heldout = localisation.localisation_heldout()
    assert heldout == [Protein("P0", "", "MAAA"), Protein("P2", "", "MDDD")]


def test_localisation_has_the_folds_of_its_authors(cache, tmp_path, monkeypatch):
    """Protein k is the validation of the authors' fold k, which alone trains on protein 10 + k."""
    sequences = ["MA", "MC", "MD", "ME", "MF", "MA", "MG", "MH", "MI", "MK", *["MLLL"] * 5]
    cv = {
        f"f{k}": {"trn": [i for i in (6, 5, 4, 3, 2, 1, 0) if i != k] + [10 + k], "vld": [k]}
        for k in range(5)
    }
    places = {"trn": [0, 1, 2, 5, 6], "vld": [3, 4], "tst": [7], "cv": cv}
    package = write_localisation(tmp_path / "x.tar.gz", sequences, places)
    monkeypatch.setattr(localisation, "fetch_python_package", lambda *a, source: package)
    for fold in range(5):
        names = {
            split: [example.name for example in part]
            for split, part in localisation.load_localisation(fold).items()
        }
        following = (fold + 1) % 5
        assert names["test"] == [f"P{fold}"] and names["validation"] == [f"P{following}"]
        # P5 has the sequence of P0.
        dropped = {fold, following, 5} if 0 in (fold, following) else {fold, following}
        kept = [i for i in (6, 5, 4, 3, 2, 1, 0) if i not in dropped]
        assert names["train"] == [f"P{i}" for i in (*kept, 10 + fold)]
    with pytest.raises(ValueError, match=r"from 0 to 4.*fold=-1"):
        localisation.load_localisation(-1)


@needs_posix
def test_peptides_are_kept_once_and_split_by_cluster(cache, tmp_path, monkeypatch):
    sequences = ["MK" * (i + 1) for i in range(40)]
    lines = ["83,1,UniProt,AMP", *(f"{text}, {int(i < 20)}" for i, text in enumerate(sequences))]
    # The first again, as another; the last again, as antimicrobial; and a copy.
    lines += [f"{sequences[0]}, 0", f"{sequences[-1]}, 1", f"{sequences[30]}, 0"]
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("modlamp/data/AMPvsUniProt.csv", "\n".join(lines) + "\n")
        archive.writestr("modlamp/data/AMPvsTMset.csv", "1,1,TM,AMP\nMKV,0\n")
    fetched = []
    monkeypatch.setattr(peptides, "fetch_python_package", lambda *a: fetched.append(a) or wheel)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="Install the package mmseqs2"):
        peptides.load_peptides()
    assert fetched == []
    # Lines 2 to 41, three in a cluster.
    table = "".join(f"{i // 3 * 3 + 2}\\t{i + 2}\\n" for i in range(40))
    script = f"test $1 = easy-cluster && printf '{table}' > clusters_cluster.tsv"
    stand_in(tmp_path / "bin", "mmseqs", script)
    for _ in range(2):
        splits = peptides.load_peptides()
        found = sorted(itertools.chain(*splits.values()), key=lambda e: int(e.name))
        assert [e.text for e in found] == sequences
        labels = ["antimicrobial"] * 20 + ["other"] * 19 + ["antimicrobial"]
        assert [e.label for e in found] == labels
        for split, part in splits.items():
            for example in part:
                first = (int(example.name) - 2) // 3 * 3 + 2
                assert split_of(str(first)) == split
    assert len(fetched) == 1


def write_structure_database(chains, stored=-1):
    """A `structure_db.dat`: what is no number of ours is filled with 7."""
    content = struct.pack("<ii", 1234, 2) + b"\7" * (0x49 - 8) + struct.pack("<i", stored)
    content += struct.pack("<q", len(chains))
    first = 0
    for chain in chains:
        for text in chain.name.encode().split(b"_"):
            content += struct.pack("<i", len(text)) + text
        content += struct.pack("<IHH", first, len(chain.text), 7) + b"\7" * 12
        first += len(chain.text)
    texts = "".join(chain.text for chain in chains).encode()
    labels = "".join(chain.label for chain in chains).encode()
    for array in (texts, 24, 4, 2, 2, labels, 40, 40):
        content += struct.pack("<q", first)
        content += b"\7" * (first * array) if isinstance(array, int) else array
    return content


def test_a_structure_database_comes_back():
    assert list(read_structure_database(write_structure_database(CHAINS))) == CHAINS


@pytest.mark.parametrize("damage", ["magic", "stored", "short", "very short", "long"])
def test_what_is_no_structure_database_is_refused(damage):
    content = write_structure_database(CHAINS, stored=3 if damage == "stored" else -1)
    content = {
        "magic": b"\0" + content[1:],
        "short": content[:-1],
        "very short": content[:99],
        "long": content + b"\0",
    }.get(damage, content)
    with pytest.raises(ValueError, match=r"of version 2|cut short|must end after"):
        list(read_structure_database(content))


@needs_posix
def test_secondary_structure_is_split_by_cluster(cache, tmp_path, monkeypatch):
    chains = [Example(f"{i:04}_A", "MK" * (i + 1), "HC" * (i + 1)) for i in range(60)]
    content = write_structure_database([*chains, Example("ZZZZ_Z", chains[0].text, "EE")])
    fetched = []
    monkeypatch.setattr(secondary_structure, "fetch_debian_package", lambda *a: fetched.append(a))
    monkeypatch.setattr(
        secondary_structure,
        "package_files",
        lambda package, *patterns: iter([("usr/structure_db.dat", content)]),
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="Install the package mmseqs2"):
        secondary_structure.load_secondary_structure()
    assert fetched == []
    table = "".join(f"{i // 3 * 3:04}_A\\t{i:04}_A\\n" for i in range(60))
    stand_in(
        tmp_path / "bin",
        "mmseqs",
        f"test $1 = easy-cluster && printf '{table}' > clusters_cluster.tsv",
    )
    for _ in range(2):
        splits = secondary_structure.load_secondary_structure()
        # The duplicate under a later name is gone.
        assert sorted(itertools.chain(*splits.values()), key=lambda e: e.name) == chains
        for split in SPLITS:
            for chain in splits[split]:
                assert split_of(f"{int(chain.name[:4]) // 3 * 3:04}_A") == split
    assert len(fetched) == 1


def test_three_states_of_eight():
    assert secondary_structure.to_q3("HGIEBTSC") == "HHHEECCC"


def test_the_class_of_an_enzyme_comes_from_its_terms_and_their_ancestors():
    ancestors = enzyme_class.read_ancestors(
        "GO:0000703\tOBO_REL:is_a\tGO:0016829\t3\n"
        "GO:0000703\tOBO_REL:is_a\tGO:0003824\t4\n"
        "GO:0000703\tOBO_REL:part_of\tGO:0016787\t4\n"
        "GO:0016829\tOBO_REL:is_a\tGO:0003824\t1\n"
    )
    label = enzyme_class.enzyme_class
    assert label(["GO:0005524", "GO:0000703"], ancestors) == "lyase"
    assert label(["GO:0016829", "GO:0000703"], ancestors) == "lyase"
    assert label(["GO:0000703", "GO:0016787"], ancestors) is None  # Two classes.
    assert label(["GO:0003824"], ancestors) is None  # Some class.
    assert label(["GO:0003674"], ancestors) is None  # Nothing known.
    assert label([], ancestors) is None
    assert label(["GO:0003674", "GO:0005524"], ancestors) == "non-enzyme"


@needs_posix
def test_enzyme_classes_are_split_by_cluster(cache, tmp_path, monkeypatch):
    kinds = ("GO:0016740", "GO:0005524", "GO:0003674")
    proteins = [
        Protein(f"P{i:02}|{kinds[i % 3]},{kinds[i % 3]}", "", "MK" * (i + 1)) for i in range(60)
    ]
    # The same sequence again makes P01 a transferase.
    proteins.insert(0, Protein("A99|GO:0016740", "", proteins[1].sequence))
    parts = zip(("pin", "phr", "psq"), write_blast_database(proteins), strict=True)
    files = [(f"x/MFO/goasp.fasta.{ending}", content) for ending, content in parts]
    files.append(("x/fullTransitiveClosureGO.txt", b"GO:0016740\tOBO_REL:is_a\tGO:0003824\t1\n"))
    monkeypatch.setattr(enzyme_class, "fetch_debian_package", lambda *a: None)
    monkeypatch.setattr(registry, "package_files", lambda package, *patterns: iter(files))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    script = "/bin/grep '>' all.fasta | /usr/bin/tr -d '>' | while read n; do "
    script += "printf 'one\\t%s\\n' $n >> clusters_cluster.tsv; done"
    stand_in(tmp_path / "bin", "mmseqs", script)
    for _ in range(2):
        splits = enzyme_class.load_enzyme_classes()
        (split,) = (name for name in SPLITS if splits[name])
        assert split == split_of("one")
        labels = {example.name: example.label for example in splits[split]}
        assert labels.pop("A99") == "transferase"
        assert labels == {
            f"P{i:02}": "non-enzyme" if i % 3 else "transferase"
            for i in range(60)
            if i % 3 < 2 and i != 1
        }


@needs_posix
def test_failing_clustering_is_told(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin", "mmseqs", "echo out of memory >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match=r"easy-linclust .*--min-seq-id 0.3.*out of memory"):
        cluster_proteins([Protein("a", "", "MK")], 30)
    for name in ("sp|P12345|X_HUMAN", ""):
        with pytest.raises(ValueError, match=rf"pass accessions. Received: '{re.escape(name)}'"):
            cluster_proteins([Protein(name, "", "MK")], 30)


def test_a_table_of_clusters(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(b"a\ta\r\na\tb\nc\tc\n")
    assert read_clusters(path) == {"a": "a", "b": "a", "c": "c"}
    path.write_text("a\ta\na b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: a representative, a tab and a member"):
        read_clusters(path)
    path.write_text("a\ta\nb\ta\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: 'a' is in the clusters of both 'a' and 'b'"):
        read_clusters(path)
