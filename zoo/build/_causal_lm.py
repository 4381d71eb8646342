"""Train a causal language model and its twin, and say what their cards say of the figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training import causal_lm
from training.config import load_config
from zoo.build._runs import CONFIGS, run_with_twin

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
    f"the same config with softmax attention and windows of {TWIN_LENGTH:,} tokens, {{parts}} "
    "times as many windows a step: same tokens, steps and parameters but for the random features."
)


def run_causal_lm(
    config: str, name: str, argv: Sequence[str] | None
) -> tuple[dict[str, Any], Path, dict[str, Any] | None, str]:
    """Run `causal_lm` with a config for a preset and its twin; see `run_with_twin`."""
    whole = load_config(causal_lm.Config, CONFIGS / config)
    parts = whole.data.sequence_length // TWIN_LENGTH
    overrides = (
        "model.attention=softmax",
        f"data.sequence_length={TWIN_LENGTH}",
        f"training.batch_size={parts * whole.training.batch_size}",
        f"training.validation_windows={parts * whole.training.validation_windows}",
    )
    return run_with_twin(causal_lm, config, name, argv, overrides, TWIN_PHRASE.format(parts=parts))


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


def heldout_inputs(preset: Path, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return 1,024 tokens of held-out sequences, on which the effect of rounding is measured."""
    from keras_performer.models import PerformerCausalLMPreprocessor

    preprocessor = PerformerCausalLMPreprocessor.from_preset(str(preset))
    return preprocessor.generate_preprocess(list(texts), sequence_length=1024)
