"""Ten steps of every recipe, from the same weights on every backend, against one stored curve.

A change that is meant to move a curve (the order of batches, the masks, a loss, a model) ends with

    PYTHONPATH=. KERAS_BACKEND=torch python tests/test_golden_curves.py

which writes `golden/curves.json` anew, and with a look at how far it moved.
"""

import importlib
import json
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
from marks import slow_on_jax
from teachers import LETTERS, save_teacher

import training.loop

GOLDEN = Path(__file__).parent / "golden" / "curves.json"
# All that a config must say stands here: the shipped ones may change.
COMMON = {
    "seed": 1,
    "data.sequence_length": 32,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.hidden_dim": 16,
    "model.intermediate_dim": 24,
    "model.num_features": 8,
    "model.dropout": 0.0,
    "training.steps": 10,
    "training.steps_per_epoch": 10,
    "training.batch_size": 6,
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 2,
    "training.beta_2": 0.98,
    "training.weight_decay": 0.1,
    "training.clip_norm": 1.0,
    "training.precision": "float32",
}
MASKS = {"data.mask_rate": 0.3, "data.mask_token_rate": 0.8, "data.random_token_rate": 0.1}
FIELDS = {"data.text_field": "text", "data.label_field": "kind"}
BUCKETS = {"data.length_multiple": 8, "data.bucket_batches": 3}
# Of each recipe, the data that it reads and its own keys. JAX always runs the first.
RECIPES = {
    "self_pretraining": ("list_ops", {"data.source": "list_ops", **FIELDS, **MASKS}),
    "protein_masked_lm": (
        "fasta",
        {"data.source": "sample", "data.heldout_share": 0.3, **MASKS, "model.gated": True},
    ),
    "causal_lm": (
        "proteins",
        {"data.source": "text", "data.heldout_share": 0.3, "model.exact_window": 4},
    ),
    "classification": (
        "proteins",
        {"data.source": "localisation", **FIELDS, **BUCKETS, "head.hidden_dim": 8},
    ),
    "residue_labels": ("proteins", {"data.states": 8, "data.text_field": "text", **BUCKETS}),
    "distill": (
        "teacher",
        {
            "data.num_masks": 3,
            "data.heldout_sequences": 4,
            "conversion.source": "sapiens-heavy",
            "conversion.num_features": 8,
            "conversion.exact_window": 2,
            "conversion.feature_map_steps": 0,
            "conversion.feature_map_rate": 1.0,
            "conversion.attention_steps": 0,
            "conversion.attention_rate": 1.0,
        },
    ),
}


class Trained(Exception):  # noqa: N818 - nothing went wrong
    """Ends a recipe after its training, with the curve."""


def write_data(kind, folder):
    letters, spread, states = "ACDEFGHIKLMNPQRSTVWY", 37, "HGIEBTSC"
    if kind == "teacher":
        save_teacher(folder / "teacher", dropout=0.0)
        letters, spread = LETTERS, 7
    rows = []
    for i in range(60):
        sequence = [letters[(i + j * (i % 7)) % len(letters)] for j in range(8 + 5 * i % spread)]
        labels = "".join(states[letters.index(letter) % 8] for letter in sequence)
        rows.append({"text": "".join(sequence), "labels": labels, "kind": "ab"[i % 2]})
        if kind == "list_ops":
            digits = [str((i + j * (i % 7)) % 10) for j in range(2 + 5 * i % 37)]
            rows[-1]["text"] = " ".join(["[MIN", *digits, "]"])
    if kind in ("fasta", "teacher"):
        lines = [f">P{i}\n{row['text']}\n" for i, row in enumerate(rows)]
    else:
        lines = [json.dumps(row) + "\n" for row in rows]
    path = folder / "data.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def draw_weights(model):
    """Fill a model with numbers that do not come from its backend."""
    rng = np.random.default_rng(0)
    for variable in model.weights:
        value = np.array(variable.numpy())
        noise = rng.normal(size=value.shape)
        if variable.name == "projection":
            variable.assign(noise)
        else:
            # Scales, which begin alike, stay near that.
            variable.assign(0.2 * noise + (value if np.ptp(value) == 0 else 0))


def curve(recipe, folder, monkeypatch):
    """Return the loss of each of ten steps, and the validation loss after them."""
    fit = training.loop.fit

    def fit_and_end(trainer, *args, **kwargs):
        draw_weights(trainer)
        means, fit_model = [], trainer.fit
        # Keras tells the mean over the steps so far.
        log = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda step, logs: means.append(float(logs["loss"]))
        )
        trainer.fit = lambda *a, callbacks, **k: fit_model(*a, callbacks=[*callbacks, log], **k)
        (row,) = fit(trainer, *args, **kwargs)["history"]
        losses = np.diff(np.arange(1, len(means) + 1) * means, prepend=0)
        raise Trained([*losses.tolist(), row["val_loss"]])

    monkeypatch.setattr(training.loop, "fit", fit_and_end)
    kind, changes = RECIPES[recipe]
    flag = "--fasta" if kind in ("fasta", "teacher") else "--file"
    (folder / "c.toml").write_text("", encoding="utf-8")
    values = {**COMMON, **changes}
    options = []
    if kind == "teacher":  # whose shape and length are its own
        own = ("model.", "data.sequence_length")
        values = {key: value for key, value in values.items() if not key.startswith(own)}
        options = [f"--preset={folder / 'teacher'}"]
    options += [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
    with pytest.raises(Trained) as trained:
        importlib.import_module(f"training.{recipe}").main(
            [f"--config={folder / 'c.toml'}", f"--output={folder / 'run'}",
             f"{flag}={write_data(kind, folder)}", *options]
        )  # fmt: skip
    return trained.value.args[0]


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("recipe", [next(iter(RECIPES)), *slow_on_jax(*list(RECIPES)[1:])])
def test_every_recipe_has_its_golden_curve(recipe, tmp_path, monkeypatch, eager):
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[recipe]
    assert len(golden) == 11
    np.testing.assert_allclose(curve(recipe, tmp_path, monkeypatch), golden, rtol=0, atol=5e-5)


def main():
    golden = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
            values = curve(recipe, Path(folder), monkeypatch)
        golden[recipe] = [round(value, 6) for value in values]
    lines = (f' "{recipe}": {json.dumps(values)}' for recipe, values in golden.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
