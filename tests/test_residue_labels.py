import json
import re

import keras
import numpy as np
import pytest
from killing import assert_same_curves, killed_and_whole, needs_kill
from recipes import CONFIGS, TINY, flags, overrides

from keras_performer.models import (
    PerformerEncoderBackbone,
    PerformerTokenClassifier,
    PerformerTokenClassifierPreprocessor,
    ProteinTokenizer,
)
from training import residue_labels
from training.config import load_config
from training.data.examples import Example
from training.data.secondary_structure import Q3, Q8, to_q3
from training.residue_labels import Config, compare, main, make_batch, read_chains

BACKEND = keras.config.backend()
CONFIG = CONFIGS / "secondary_structure.toml"
SMALL = {
    **TINY,
    "data.sequence_length": 24,
    "data.length_multiple": 0,
    "data.bucket_batches": 1,
    "training.steps": 10,
    "training.steps_per_epoch": 5,
    "training.warmup_steps": 2,
    "training.precision": "float32",
    "training.validation_windows": 16,
}
# A state for each letter, so that there is something to learn.
STATE_OF = dict(zip("ACDEFGHIKLMN", "HGIEBTSCHECH", strict=True))


def load(**changes):
    return load_config(Config, CONFIG, overrides(SMALL | changes))


def write(path, rows):
    lines = (json.dumps({"sequence": a, "labels": b}) + "\n" for a, b in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(160):
        sequence = "".join(rng.choice(list(STATE_OF), rng.integers(8, 40)))
        states = "".join(STATE_OF[letter] for letter in sequence)
        rows.append((sequence, "--" + states[2:]))
    return write(tmp_path_factory.mktemp("data") / "c.jsonl", rows)


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_state_for_each_letter_is_learned(chains, tmp_path):
    output = tmp_path / "run"
    changes = {"training.steps": 40, "training.steps_per_epoch": 20}
    metrics = main(
        [f"--config={CONFIG}", f"--file={chains}", f"--output={output}", *flags(SMALL | changes)]
    )
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    model, majority = metrics["test"]["model"], metrics["test"]["majority"]
    assert model["q8"] > 0.85 > 0.5 > majority["q8"]
    assert model["q3"] >= model["q8"] and majority["q3"] > majority["q8"]
    assert model["q8_per_protein"]["mean"] > 0.85
    assert model["cross_entropy"] < 0.5 * majority["cross_entropy"]
    assert sum(metrics[f"{part}_proteins"] for part in ("train", "validation", "test")) == 160
    assert metrics["reload_max_abs_difference"] <= 1e-5
    assert len(metrics["training"]["history"]) == 2 and not (output / "backup").exists()

    # The preset takes strings and gives the states that it names.
    reloaded = PerformerTokenClassifier.from_preset(str(output / "preset"))
    states = json.loads((output / "preset" / "classes.json").read_text(encoding="utf-8"))
    assert states == list(Q8)
    logits = reloaded.predict(["ACDEFGHIKLMN"], verbose=0)[0]
    assert "".join(states[i] for i in logits[1:13].argmax(-1)) == "".join(STATE_OF.values())


@needs_kill
@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_process_that_is_killed_in_an_epoch_goes_on(chains, tmp_path):
    changes = {
        "data.length_multiple": 8,
        "data.bucket_batches": 3,
        "model.dropout": 0.2,
        "model.exact_window": 4,
        "training.steps": 12,
        "training.steps_per_epoch": 4,
        "training.accumulate": 2,
        "training.redraw_features_every": 3,
    }
    options = [f"--config={CONFIG}", f"--file={chains}", *flags(SMALL | changes)]
    killed, whole = killed_and_whole("residue_labels", options, tmp_path)
    assert_same_curves(killed, whole)
    model, expected = (metrics["test"]["model"] for metrics in (killed, whole))
    assert model["q8"] == pytest.approx(expected["q8"], abs=1e-5)
    assert model["cross_entropy"] == pytest.approx(expected["cross_entropy"], abs=1e-5)


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_three_states_and_a_baseline(chains, tmp_path, eager):
    changes = {"data.states": 3, "model.attention": "sliding_window", "training.patience": 2}
    metrics = main(
        [f"--config={CONFIG}", f"--file={chains}", f"--output={tmp_path}", *flags(SMALL | changes)]
    )
    assert metrics["attention"] == "sliding_window" and list(metrics["test"]["classes"]) == list(Q3)
    assert "q8" not in metrics["test"]["model"]
    assert metrics["test"]["model"]["q3"] > metrics["test"]["majority"]["q3"]
    model = PerformerTokenClassifier.from_preset(str(tmp_path / "preset"))
    assert model.num_classes == 3 and model.backbone.attention == "sliding_window"


def test_a_batch_lays_each_state_beside_its_residue():
    config = load(
        **{"data.sequence_length": 8, "data.length_multiple": 3, "data.bucket_batches": 3}
    )
    texts = [("ACDEFGHIKLMNP", "HHHGGGEEETTTS"), ("MKV", "C-C"), ("MKVAW", "HGIEB")]
    parts = read_chains([Example("", *row) for row in texts], 8, "")
    assert parts.windows(6) == [(0, 0), (0, 6), (0, 12), (1, 0), (2, 0)]
    tokenizer = ProteinTokenizer()
    x, y, weights = make_batch(parts, [(0, 6), (1, 0)], tokenizer, config)
    assert x["token_ids"].shape == y.shape == weights.shape == (2, 8)
    assert tokenizer.detokenize(x["token_ids"]) == ["HIKLMN", "MKV"]
    np.testing.assert_array_equal(x["padding_mask"].sum(1), [8, 5])
    assert y[0].tolist() == [0, *(Q8.index(state) for state in "EEETTT"), 0]
    assert y[1].tolist() == [0, Q8.index("C"), 0, Q8.index("C"), 0, 0, 0, 0]
    np.testing.assert_array_equal(weights, [[0, 1, 1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0, 0]])
    assert make_batch(parts, [(1, 0)], tokenizer, config)[1].shape == (1, 6)
    three = read_chains([Example("", *row) for row in texts], 3, "")
    assert [Q3[i] for i in three.states[2]] == list(to_q3("HGIEB"))


class ByLetter:
    """Predicts of each token the state that a table gives, with probability 1/2."""

    def __init__(self, table):
        tokenizer = ProteinTokenizer()
        self.probabilities = np.full((tokenizer.vocabulary_size(), 8), 1 / 14)
        for letter, state in table.items():
            self.probabilities[tokenizer.token_to_id(letter), Q8.index(state)] = 1 / 2

    def predict_on_batch(self, x):
        return np.log(self.probabilities[x["token_ids"]])


def test_figures_agree_with_a_calculation_by_hand():
    config = load(**{"data.sequence_length": 8, "training.batch_size": 2})
    train = read_chains([Example("", "AAAA", "HHE-")], 8, "")
    # Of the first protein, longer than a window, nine residues count; of the third none.
    rows = [("AAACCCDDDD", "HGEEEBTH-C"), ("AC", "HC"), ("A", "-")]
    test = read_chains([Example("", *row) for row in rows], 8, "")
    model = ByLetter({"A": "H", "C": "E", "D": "T"})
    result = compare(model, train, test, ProteinTokenizer(), config)
    # Predicted HHHEEETT.T and HE.
    assert (result["proteins"], result["residues"]) == (2, 11)
    assert result["model"]["q8"] == pytest.approx((4 + 1) / 11)
    # G is a helix, B a strand; T and C are neither.
    assert result["model"]["q3"] == pytest.approx((7 + 1) / 11)
    q8, q3 = np.array([4 / 9, 1 / 2]), np.array([7 / 9, 1 / 2])
    for name, shares in (("q8", q8), ("q3", q3)):
        row = result["model"][f"{name}_per_protein"]
        assert row["mean"] == pytest.approx(shares.mean())
        assert row["standard_error"] == pytest.approx(shares.std(ddof=1) / 2**0.5)
    nats = 5 * np.log(2) + 6 * np.log(14)
    assert result["model"]["cross_entropy"] == pytest.approx(nats / 11, rel=1e-5)
    # Always H; frequencies with one added are 3, 2 and six times 1 of 11.
    assert result["majority"]["q8"] == pytest.approx(3 / 11)
    assert result["majority"]["q3"] == pytest.approx(4 / 11)
    nats = -(3 * np.log(3 / 11) + 3 * np.log(2 / 11) + 5 * np.log(1 / 11))
    assert result["majority"]["cross_entropy"] == pytest.approx(nats / 11)
    assert result["classes"]["H"] == pytest.approx(
        {"precision": 2 / 4, "recall": 2 / 3, "f1": 4 / 7, "residues": 3}
    )


GOOD = [("MKV" + "A" * i, "HHH" + "E" * i) for i in range(60)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, ["--file=nothing.jsonl"], r"nothing\.jsonl: there is no such file"),
        ([*GOOD, ("MKVW", "HHH")], [], r"c\.jsonl:61 has 4 residues and 3 labels"),
        ([*GOOD, ("MKVW", "HHHX")], [], r"c\.jsonl:61 has the label 'X'"),
        ([(a, "-" * len(b)) for a, b in GOOD], [], "no residue of the train split has a known"),
        (GOOD, ["--set=data.label_field=dssp"], r"there must be a text or number in 'dssp'"),
        (GOOD, ["--set=training.batch_size=99"], "proteins are left to train on, fewer than one"),
        (GOOD, ["--set=data.states=4"], r"'data\.states' must be 8 or 3"),
        (GOOD, ["--set=data.length_multiple=8"], r"'data\.bucket_batches' must be at least 3"),
        (GOOD, ["--set=data.state=3"], r"no key 'data\.state'.*'data\.states'"),
        (GOOD, ["--preset=nothing"], "nothing"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_sentence_before_any_training(
    tmp_path, monkeypatch, rows, options, message
):
    monkeypatch.setattr(residue_labels, "train", lambda *_: pytest.fail("training started"))
    if rows is not None:
        options = [f"--file={write(tmp_path / 'c.jsonl', rows)}", *options]
    with pytest.raises(SystemExit, match=message) as error:
        main([f"--config={CONFIG}", f"--output={tmp_path / 'run'}", *flags(SMALL), *options])
    assert re.match("error: [^\n]*$", str(error.value)), str(error.value)


def test_a_preset_whose_positions_end_too_early_is_refused(tmp_path):
    tokenizer = ProteinTokenizer()
    encoder = PerformerEncoderBackbone(
        tokenizer.vocabulary_size(), num_layers=1, num_heads=1, hidden_dim=2, intermediate_dim=3,
        num_features=5, position_embedding="learned", max_sequence_length=23,
    )  # fmt: skip
    preprocessor = PerformerTokenClassifierPreprocessor(tokenizer, sequence_length=23)
    PerformerTokenClassifier(encoder, 8, preprocessor).save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"at most 23 tokens, and 'data\.sequence_length' is 24"):
        residue_labels.build_model(load(), str(tmp_path), None)
