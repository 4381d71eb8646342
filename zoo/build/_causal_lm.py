"""What the cards of causal language models say of their figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEXT_ROWS = (
    ("bits per byte", "lower", "bits_per_byte", 1),
    ("perplexity of a token", "lower", "perplexity", 1),
    ("next token right in %", "higher", "accuracy", 100),
)
PROTEIN_ROWS = (
    ("perplexity", "lower", "perplexity", 1),
    ("cross-entropy in nats", "lower", "cross_entropy", 1),
    ("next residue right in %", "higher", "accuracy", 100),
)
# Softmax attention over whole windows takes several times as long, so a twin sees parts of them.
TWIN_LENGTH = 1024
TWIN_PHRASE = (
    f"the same config with softmax attention and windows of {TWIN_LENGTH:,} tokens, as many more "
    "of them in a step: same tokens, steps and parameters but for the random features."
)


def twin_overrides(length: int, validation_windows: int) -> tuple[str, ...]:
    """Return the overrides of a config whose windows have so many tokens."""
    parts = length // TWIN_LENGTH
    return (
        "model.attention=softmax",
        f"data.sequence_length={TWIN_LENGTH}",
        f"training.batch_size={parts}",
        f"training.validation_windows={parts * validation_windows}",
    )


def evaluation(model: dict[str, Any], sequences: str) -> str:
    """Return what was measured, and how sure it is.

    **Args**
        model: The figures of the run.
        sequences: What a sequence is called, in the plural.
    """
    test = model["test"]
    difference = test["difference"]
    return (
        f"{test['tokens']:,} tokens of {test['sequences']:,} {sequences} that it was not trained "
        "on, each predicted from those before it in its window. The cross-entropy is "
        f"{difference['mean']:.3f} ± {difference['standard_error']:.3f} nats a token below the "
        f"baseline's (mean over {sequences}, with its standard error)."
    )


def heldout_inputs(preset: Path, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Return beginnings of held-out sequences, on which the effect of rounding is measured."""
    from keras_performer.models import PerformerCausalLMPreprocessor

    preprocessor = PerformerCausalLMPreprocessor.from_preset(str(preset))
    return preprocessor.generate_preprocess(list(texts), sequence_length=length)
