"""Rebuild the shipped protein sample from the PyPI package it is drawn from.

Run `python -m training.data.build_protein_sample`. The result is the same bytes each time.
"""

import gzip
import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable

from training.data.examples import Example, hashed_percent
from training.data.localisation import load_localisation
from training.data.protein_sample import SAMPLE_PATH, SAMPLE_SHA256

NUM_DRAWN = 6300
HELDOUT_PERCENT = 8
# Two proteins are near relatives if they share this part of the shorter one's distinct words.
WORD_LENGTH = 6
RELATED_SHARE = 0.05


def main() -> None:
    """Build the sample, check it, and write it."""
    rows = draw(load_localisation()["train"])
    heldout = {name for name in rows if hashed_percent(f"heldout {name}") < HELDOUT_PERCENT}
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


def draw(train: Iterable[Example]) -> dict[str, tuple[str, str]]:
    """Return the sequence and class of the drawn accessions.

    The draw is from the training split, in which no sequence of the other splits is, without
    repeated sequences: the alphabetically first accession stays. It takes the accessions with the
    smallest hashes.
    """
    seen = set()
    rows = {}
    for example in sorted(train, key=lambda example: example.name):
        if example.text not in seen:
            seen.add(example.text)
            rows[example.name] = (example.text, example.label)
    chosen = sorted(rows, key=lambda accession: hashlib.sha256(accession.encode()).digest())
    return {accession: rows[accession] for accession in chosen[:NUM_DRAWN]}


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
