"""Folds of a data set that is too small for one test split: each is the test once."""

from collections.abc import Sequence

from training.data.examples import SPLITS, Example, Splits, hashed_percent

NUM_FOLDS = 5


def check_fold(fold: int) -> None:
    """Raise ValueError unless there is a fold of this number."""
    if not 0 <= fold < NUM_FOLDS:
        raise ValueError(f"Folds are numbered from 0 to {NUM_FOLDS - 1}. Received: fold={fold}")


def deal_to_folds(examples: Sequence[Example], fold: int) -> Splits:
    """Return the splits of one fold.

    Each class is dealt out evenly to the folds in the order of the hashes of its examples' names.
    One fold is the test, the next the validation, the others are for training.

    **Raises** ValueError if there is no such fold.

    **Example**

    >>> [len(part) for part in deal_to_folds([Example(str(i), "") for i in range(10)], 0).values()]
    [6, 2, 2]
    """
    check_fold(fold)
    splits: Splits = {name: [] for name in SPLITS}
    ordered = sorted(examples, key=lambda e: (e.label, hashed_percent(e.name), e.name))
    for place, example in enumerate(ordered):
        # Dealing goes on from one class to the next, so that the folds are of one size.
        role = {0: "test", 1: "validation"}.get((place - fold) % NUM_FOLDS, "train")
        splits[role].append(example)
    return splits
