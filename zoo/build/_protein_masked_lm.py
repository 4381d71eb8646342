"""What the cards of masked language models of proteins say of their figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_performer.models import PerformerMaskedLMPreprocessor
from training.data.fasta import Protein
from training.data.masked_batches import mask_sequences

ROWS = (
    ("perplexity", "lower", "perplexity", 1),
    ("cross-entropy in nats", "lower", "cross_entropy", 1),
    ("accuracy in %", "higher", "accuracy", 100),
)


def evaluation(model: dict[str, Any], twin: dict[str, Any] | None) -> str:
    """Return what was measured, and how sure it is.

    **Args**
        model: The figures of the run.
        twin: Those of the softmax twin's run; None: there is none.
    """
    heldout = model["heldout"]
    ours, theirs = heldout["difference"], twin and twin["heldout"]["difference"]
    text = (
        f"{heldout['masked_residues']:,} masked residues of the held-out proteins, in windows of "
        f"at most {model['config']['data']['sequence_length'] - 2} residues. Cross-entropy, mean "
        f"over proteins, is {ours['mean']:.4f} ± {ours['standard_error']:.4f} nats below the "
        "baseline's"
    )
    if theirs:
        text += f"; the twin's is {theirs['mean']:.4f} ± {theirs['standard_error']:.4f} below"
    return f"{text}."


def heldout_inputs(preset: Path, heldout: Sequence[Protein]) -> dict[str, np.ndarray]:
    """Return masked held-out proteins, on which the effect of rounding is measured."""
    preprocessor = PerformerMaskedLMPreprocessor.from_preset(str(preset))
    ids = [np.asarray(preprocessor.tokenizer.tokenize(p.sequence), "int32") for p in heldout[:64]]
    inputs, _, _ = mask_sequences(ids, preprocessor, np.random.default_rng(0), always_mask=True)
    return inputs
