"""What the cards of classifiers of sequences say of their figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS = (
    ("accuracy in %", "higher", "accuracy", 100),
    ("macro F1", "higher", "macro_f1", 1),
    ("Matthews correlation", "higher", "matthews", 1),
    ("cross-entropy in nats", "lower", "cross_entropy", 1),
)


def evaluation(model: dict[str, Any], examples: str) -> str:
    """Return what was measured, and how sure it is.

    **Args**
        model: The figures of the run.
        examples: What an example is called, in the plural.
    """
    test = model["test"]
    low, high = (100 * bound for bound in test["model"]["accuracy_interval"])
    return (
        f"{test['examples']:,} {examples} of the test split; the 95 % interval of the accuracy is "
        f"{low:.1f} to {high:.1f} %."
    )


def baseline(examples: str) -> str:
    """Return what the figures are compared with; `examples` as in `evaluation`."""
    return (
        "always the most frequent class; for cross-entropy the frequencies of the classes in the "
        f"training {examples}."
    )


def heldout_inputs(preset: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return inputs made of held-out texts, on which the effect of rounding is measured."""
    from keras_performer.models import PerformerSequenceClassifierPreprocessor

    preprocessor = PerformerSequenceClassifierPreprocessor.from_preset(str(preset))
    return preprocessor(list(texts))
