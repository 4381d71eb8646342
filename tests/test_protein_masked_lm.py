import importlib.util
import io
import json
import re
from typing import Any

import keras
import numpy as np
import pytest
from killing import assert_same_curves, killed_and_whole, needs_kill
from recipes import TINY, flags, overrides
from rich.console import Console

from keras_performer.models import (
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    ProteinTokenizer,
)
from training import protein_masked_lm
from training.config import load_config
from training.data.batches import Batches
from training.data.masked_batches import mask_sequences
from training.masking import compare, train, unigram_log_probabilities
from training.protein_masked_lm import (
    DEFAULT_CONFIG,
    Config,
    build_model,
    main,
    prepare_output,
    read_proteins,
    sequences_sha256,
    tokenize,
)
from training.results import finish

BACKEND = keras.config.backend()
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
SMALL = {
    **TINY,
    "data.sequence_length": 48,
    "data.heldout_share": 0.3,
    "model.hidden_dim": 32,
    "model.intermediate_dim": 32,
    "model.num_features": 16,
    "model.exact_window": 16,
    "training.steps": 60,
    "training.steps_per_epoch": 20,
    "training.warmup_steps": 5,
    "training.validation_proteins": 8,
}


def write_fasta(path, num_proteins=120):
    """Proteins of two letters each, so that a protein tells much about its masked residues."""
    rng = np.random.default_rng(5)
    lines = []
    for i in range(num_proteins):
        letters = rng.choice(list(AMINO_ACIDS), 2, replace=False)
        sequence = "".join(rng.choice(letters, rng.integers(20, 80)))
        lines.append(f">P{i} made up\n{sequence}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run(fasta, output, **changes):
    return main([f"--fasta={fasta}", f"--output={output}", *flags(SMALL | changes)])


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    return write_fasta(tmp_path_factory.mktemp("proteins") / "p.fasta")


@pytest.fixture(scope="module")
def finished(fasta, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "new" / "run"
    return run(fasta, output, **{"training.precision": "mixed_bfloat16"}), output


@pytest.mark.slow_on_torch
def test_the_job_learns_and_writes_what_it_says(finished, fasta):
    metrics, output = finished
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert metrics["train_proteins"] + metrics["heldout_proteins"] == 120
    difference = metrics["heldout"]["difference"]
    assert difference["mean"] > 5 * difference["standard_error"]
    model, unigram = metrics["heldout"]["model"], metrics["heldout"]["unigram"]
    assert model["cross_entropy"] < unigram["cross_entropy"] - 0.3
    assert model["accuracy"] > unigram["accuracy"]
    assert metrics["reload_max_abs_difference"] == 0
    exports = metrics["export_max_abs_difference"]
    assert set(exports) == {"tf_saved_model", "litert"}
    if importlib.util.find_spec("tensorflow") is not None:
        assert (output / "saved_model").is_dir() and (output / "model.tflite").is_file()
        assert max(exports.values()) < 1e-4
    assert not (output / "backup").exists()
    if importlib.util.find_spec("tensorflow") is not None:  # Keras writes them with it
        assert list((output / "tensorboard").rglob("events.*"))
    model = PerformerMaskedLM.from_preset(str(output / "preset"), dtype="float32")
    assert model.preprocessor.sequence_length == SMALL["data.sequence_length"]
    assert model.preprocessor(["MKTAY"])[0]["token_ids"].shape == (1, 48)


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(fasta, tmp_path, monkeypatch, eager):
    # Dropout, lengths by bucket, accumulated gradients and new features: all of it comes back.
    changes = {
        **SMALL,
        "data.length_multiple": 16,
        "data.bucket_batches": 3,
        "model.dropout": 0.2,
        "model.exact_window": 4,
        "training.steps": 8,
        "training.steps_per_epoch": 4,
        "training.warmup_steps": 1,
        "training.batch_size": 4,
        "training.accumulate": 2,
        "training.redraw_features_every": 3,
    }
    config = load_config(Config, DEFAULT_CONFIG, overrides(changes))
    proteins, heldout, _ = read_proteins(fasta, config)
    digest = sequences_sha256(proteins, heldout)

    def train_model(output):
        model, preprocessor = build_model(config, None)
        ids = [tokenize(part, preprocessor.tokenizer) for part in (proteins, heldout)]
        batch = mask_sequences(ids[1], preprocessor, np.random.default_rng(0))
        console = Console(file=io.StringIO())
        lengths = np.array([len(row) for row in ids[0]])
        _, record = train(model, preprocessor, config, ids[0], lengths, batch, output, console)
        return model.get_weights(), record["history"]

    walk = []
    get = Batches.__getitem__

    def get_or_die(self, index):
        walk.append((self.epoch, index))
        if die and (self.epoch, index) == (1, 2):
            raise RuntimeError("killed")
        return get(self, index)

    monkeypatch.setattr(Batches, "__getitem__", get_or_die)
    die = True
    output = prepare_output(tmp_path / "run", config, digest)
    with pytest.raises(Exception, match="killed"):
        train_model(output)
    changes["training.learning_rate"] = 1e-3
    other = load_config(Config, DEFAULT_CONFIG, overrides(changes))
    with pytest.raises(ValueError, match="unfinished run with another config or other data"):
        prepare_output(output, other, digest)
    with pytest.raises(ValueError, match="unfinished run with another config or other data"):
        prepare_output(output, config, sequences_sha256(heldout, proteins))
    # A key that was not there yet when the run began has its default.
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    del record["config"]["training"]["patience"]
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")

    die = False
    assert prepare_output(output, config, digest) == output
    walk.clear()
    resumed, resumed_history = train_model(output)
    # The first epoch is only looked at for the shapes of its batches.
    assert [step for step in walk if step[0] > 0] == [(1, index) for index in range(4)]
    whole, history = train_model(prepare_output(tmp_path / "whole", config, digest))
    untrained = build_model(config, None)[0].get_weights()
    assert max(np.abs(a - b).max() for a, b in zip(whole, untrained, strict=True)) > 1e-3
    for a, b in zip(resumed, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert [row["epoch"] for row in resumed_history] == [0, 1]
    for a, b in zip(resumed_history, history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)


@needs_kill
@pytest.mark.slow
def test_a_process_that_is_killed_in_an_epoch_goes_on(fasta, tmp_path):
    options = [f"--fasta={fasta}", *flags(SMALL | {"model.dropout": 0.2})]
    runs = killed_and_whole("protein_masked_lm", options, tmp_path)
    assert_same_curves(*runs)


@pytest.mark.parametrize(
    "content, options, message",
    [
        ("name,sequence\nP1,MKTAY\n", [], r"p\.fasta, line 1: this is not a FASTA file"),
        ("", [], r"p\.fasta: the file is empty"),
        (">P1\nACGTNACGT\n>P2\nGGGTTT\n", [], "look like DNA"),
        (">P1\nMKTAY\n>P2\nJJ\n", [], "'P2' is made of J only"),
        (">P1\nMKTAY\n>P2\nMKTAY\n", [], r"2 records, 1 distinct.*2 or more are needed"),
        (None, ["--fasta=nothing.fasta"], r"nothing\.fasta: there is no such file"),
        (None, ["--set=training.batch_size=6000"], r"5494 protein\(s\) are left"),
        (None, ["--set=training.step=3"], r"no key 'training\.step'.*'training\.steps'"),
        (None, ["--set=training.steps=many"], r"'training\.steps' must be of type int"),
        (None, ["--config=nothing.toml"], r"nothing\.toml: there is no such config"),
        (None, ["--set=model.num_heads=3"], "hidden_dim=128, num_heads=3"),
        (
            None,
            ["--set=training.patience=1", "--set=training.validation_proteins=510"],
            "1 of 511 held-out proteins are left to score",
        ),
        (None, ["--set=data.sequence_length=8"], r"'data\.sequence_length' must be at least 16"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_any_training(
    tmp_path, monkeypatch, content, options, message
):
    monkeypatch.setattr(protein_masked_lm, "train", lambda *_: pytest.fail("training started"))
    if content is not None:
        (tmp_path / "p.fasta").write_text(content, encoding="utf-8")
        options = [f"--fasta={tmp_path / 'p.fasta'}", *options]
    with pytest.raises(SystemExit, match=message) as error:
        main([f"--output={tmp_path / 'run'}", *options])
    assert re.match("error: [^\n]*$", str(error.value))


def test_an_output_that_cannot_be_written_and_a_late_backend(tmp_path, monkeypatch):
    monkeypatch.setattr(protein_masked_lm, "train", lambda *_: pytest.fail("training started"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="output folder cannot be written"):
        main([f"--output={tmp_path / 'file' / 'run'}"])
    other = "jax" if BACKEND != "jax" else "torch"
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    with pytest.raises(SystemExit, match=f"already runs on {BACKEND}"):
        main([f"--output={tmp_path / 'run'}", f"--backend={other}"])


@pytest.mark.slow_on_jax
def test_patience_and_the_figures_see_different_proteins(fasta, tmp_path, monkeypatch, eager):
    seen = []

    def stop(trainer, baseline, batch, batch_size):
        seen.append(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(protein_masked_lm, "compare", stop)
    few = {"training.steps": 2, "training.steps_per_epoch": 2, "training.warmup_steps": 0}
    for patience in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            run(fasta, tmp_path / str(patience), **few, **{"training.patience": patience})
    (everything, _, _), (scored, _, _) = seen
    for name, array in everything.items():
        np.testing.assert_array_equal(scored[name], array[SMALL["training.validation_proteins"] :])


class Exports:
    """What `export_all` calls, in place of an export that cannot be had or is wrong."""

    def __init__(self, model, path, format):
        if format == "litert":
            raise ValueError("no kernel for this operation")


def test_an_export_that_fails_is_told_and_costs_no_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_performer.export", Exports)
    monkeypatch.setattr(protein_masked_lm, "run_saved_model", lambda path, x: np.full((2, 3), 0.5))
    console = Console(file=io.StringIO())
    found = protein_masked_lm.export_all(None, tmp_path, {}, np.zeros((2, 3)), console)
    assert found == {"tf_saved_model": 0.5, "litert": None}
    assert "No litert: no kernel for this operation" in console.file.getvalue()
    (tmp_path / "backup").mkdir()
    metrics = {"seconds": 1.0, "reload_max_abs_difference": 0.0, "export_max_abs_difference": found}
    with pytest.raises(RuntimeError, match=r"the tf_saved_model export by 5\.00e-01.*TF32"):
        finish(tmp_path, metrics, console)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert (tmp_path / "backup").is_dir()
    with pytest.raises(RuntimeError, match="the reloaded preset by nan"):
        finish(tmp_path, {"seconds": 1.0, "reload_max_abs_difference": np.nan}, console)
    finish(tmp_path, {"seconds": 1.0, "reload_max_abs_difference": 1e-6}, console)
    assert not (tmp_path / "backup").exists()


def masked(always_mask):
    tokenizer = ProteinTokenizer()
    preprocessor = PerformerMaskedLMPreprocessor(
        tokenizer, sequence_length=23, mask_selection_rate=0.3
    )
    letters = [AMINO_ACIDS, "MJ", "W" * 200, "ACDEFGHIKL" * 7]
    proteins = [np.asarray(tokenizer.tokenize(text), "int32") for text in letters]
    rng = np.random.default_rng(0)
    return tokenizer, proteins, mask_sequences(proteins, preprocessor, rng, always_mask)


def test_masks_stand_on_residues_and_labels_restore_the_protein():
    tokenizer, proteins, (x, y, weights) = masked(always_mask=True)
    assert x["token_ids"].shape == (4, 23) and y.shape == weights.shape == (4, 6)
    np.testing.assert_array_equal(weights.sum(1), [6, 1, 6, 6])
    np.testing.assert_array_equal(x["padding_mask"].sum(1), [22, 4, 23, 23])
    for row, protein in enumerate(proteins):
        tokens = x["token_ids"][row].copy()
        places = x["mask_positions"][row][weights[row] > 0]
        assert len(set(places.tolist())) == len(places)
        assert (tokens[places] == tokenizer.mask_token_id).all()
        assert (tokens == tokenizer.mask_token_id).sum() == len(places)
        tokens[places] = y[row][weights[row] > 0]
        length = min(len(protein), 21)
        assert tokens[0] == tokenizer.start_token_id
        assert tokens[length + 1] == tokenizer.end_token_id
        assert (tokens[length + 2 :] == tokenizer.pad_token_id).all()
        window = np.lib.stride_tricks.sliding_window_view(protein, length)
        assert (window == tokens[1 : length + 1]).all(1).any()
    assert tokenizer.token_to_id("J") == tokenizer.unk_token_id
    assert tokenizer.unk_token_id not in y[weights > 0]


def test_training_masks_replace_some_keep_some_and_use_no_special_token():
    tokenizer = ProteinTokenizer()
    preprocessor = PerformerMaskedLMPreprocessor(tokenizer, sequence_length=1002)
    protein = np.asarray(tokenizer.tokenize("W" * 1000), "int32")
    x, y, weights = mask_sequences([protein] * 20, preprocessor, np.random.default_rng(0))
    tokens = np.take_along_axis(x["token_ids"], x["mask_positions"], 1)
    assert weights.all() and (y == protein[0]).all() and y.shape == (20, 150)
    share = (tokens == tokenizer.mask_token_id).mean()
    assert abs(share - 0.8) < 5 * (0.8 * 0.2 / tokens.size) ** 0.5
    random_tokens = tokens[(tokens != tokenizer.mask_token_id) & (tokens != protein[0])]
    assert not np.isin(random_tokens, tokenizer.special_token_ids).any()
    expected = 0.1 * 24 / 25
    share = random_tokens.size / tokens.size
    assert abs(share - expected) < 5 * (expected * (1 - expected) / tokens.size) ** 0.5


def test_a_batch_can_end_with_its_longest_protein():
    tokenizer = ProteinTokenizer()
    preprocessor = PerformerMaskedLMPreprocessor(
        tokenizer, sequence_length=100, mask_selection_rate=0.2
    )
    for longest, expected in ((13, 16), (14, 16), (15, 32), (90, 96), (95, 100), (500, 100)):
        proteins = [np.asarray(tokenizer.tokenize("W" * n), "int32") for n in (3, longest)]
        rng = np.random.default_rng(0)
        x, y, weights = mask_sequences(proteins, preprocessor, rng, length_multiple=16)
        assert x["token_ids"].shape == x["padding_mask"].shape == (2, expected)
        assert y.shape == weights.shape == (2, round(0.2 * (expected - 2)))
        assert weights[1].sum() == round(0.2 * min(longest, expected - 2))


class FixedModel:
    def __init__(self, logits):
        self.logits = logits

    def predict_on_batch(self, x):
        return np.broadcast_to(self.logits, (*x["mask_positions"].shape, 3)).astype("float32")


def test_figures_agree_with_a_calculation_by_hand():
    # The last has no masked place.
    y = np.array([[1, 2, 0], [1, 0, 0], [2, 2, 1], [0, 0, 0]], "int32")
    weights = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], "float32")
    batch = ({"mask_positions": y}, y, weights)
    with np.errstate(divide="ignore"):
        baseline = np.log([0, 0.5, 0.5])
    model: Any = FixedModel(np.log([0.25, 0.25, 0.5]) + 7)
    result = compare(model, baseline, batch, batch_size=2)
    log2 = np.log(2)
    assert result["unigram"]["cross_entropy"] == pytest.approx(log2)
    assert result["unigram"]["accuracy"] == pytest.approx(3 / 6)
    assert result["model"]["cross_entropy"] == pytest.approx((3 * 2 * log2 + 3 * log2) / 6)
    assert result["model"]["perplexity"] == pytest.approx(2**1.5)
    assert result["model"]["accuracy"] == pytest.approx(3 / 6)
    differences = -log2 * np.array([0.5, 1, 1 / 3])
    error = differences.std(ddof=1) / 3**0.5
    assert result["difference"]["mean"] == pytest.approx(differences.mean())
    assert result["difference"]["standard_error"] == pytest.approx(error)


def test_unigram_counts_residues_and_adds_one():
    tokenizer = ProteinTokenizer()
    proteins = [np.asarray(tokenizer.tokenize(text), "int32") for text in ("MMK", "MJ")]
    probabilities = np.exp(unigram_log_probabilities(proteins, tokenizer))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[tokenizer.token_to_id("M")] == pytest.approx(4 / (4 + 25))
    assert probabilities[tokenizer.token_to_id("A")] == pytest.approx(1 / (4 + 25))
    assert not probabilities[list(tokenizer.special_token_ids)].any()
