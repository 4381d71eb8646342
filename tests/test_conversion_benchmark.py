"""The scores of the benchmark of converted models, by hand, and every row of its table."""

import math
from types import SimpleNamespace

import keras
import keras_hub
import numpy as np
import pytest

pytest.importorskip("rich")

from rich.progress import Progress

from keras_performer.convert import performerize
from training.benchmarks import conversion
from training.benchmarks.conversion import Plan
from training.converted import Masked, difference, mask_residues, score, summary

# Nine models and six ways to train: seconds, but for the backends that compile each of them.
slow_where_compiled = (lambda test: test) if keras.config.backend() == "torch" else pytest.mark.slow
RESIDUES = "ACDEF"
TOKENIZER = SimpleNamespace(
    pad_token_id=1,
    start_token_id=0,
    end_token_id=2,
    mask_token_id=3,
    token_to_id=lambda residue: 4 + RESIDUES.index(residue),
)


def mask(sequences, num_masks=2, length=12):
    rng = np.random.default_rng(5)
    return mask_residues(sequences, TOKENIZER, length, num_masks, rng)


def random_sequences(count):
    rng = np.random.default_rng(6)
    return ["".join(rng.choice(list(RESIDUES), rng.integers(6, 11))) for _ in range(count)]


def lookup_model(probabilities):
    """A model whose probabilities at a masked position are a row of a table, whatever it reads."""
    inputs = {
        name: keras.Input((None,), dtype="int32", name=name)
        for name in ("token_ids", "padding_mask", "mask_positions")
    }
    table = keras.layers.Embedding(*np.shape(probabilities))
    model = keras.Model(inputs, table(inputs["mask_positions"]))
    table.set_weights([np.log(probabilities) + 3.0])  # logits need not be normalised
    return model


def test_scores_are_those_computed_by_hand():
    positions = np.array([[0, 1], [1, 2]], "int32")
    ids = np.zeros((2, 3), "int32")
    inputs = {"token_ids": ids, "padding_mask": ids + 1, "mask_positions": positions}
    data = Masked(inputs, labels=np.array([[0, 1], [0, 2]]))
    one = lookup_model([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 4, 1 / 2]])
    two = lookup_model([[1 / 4, 1 / 2, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 4, 1 / 2, 1 / 4]])
    found, other = (score(model, data, batch_size=1) for model in (one, two))
    # The truth has probability 1/2 and 3/4 in the first sequence, 1/8 and 1/2 in the second.
    np.testing.assert_allclose(found.accuracy, [1, 1 / 2])
    np.testing.assert_allclose(found.loss, [-math.log(3 / 8) / 2, -math.log(1 / 16) / 2], 1e-6)
    np.testing.assert_allclose(other.accuracy, [1 / 2, 0])

    row = summary(found)
    assert row["accuracy"]["mean"] == pytest.approx(3 / 4)
    # Two values d apart have the standard deviation d / sqrt(2), and their mean the error d / 2.
    assert row["accuracy"]["standard_error"] == pytest.approx(1 / 4)
    # One over the geometric mean of the four probabilities.
    perplexity = (3 / 128) ** -0.25
    assert row["perplexity"]["mean"] == pytest.approx(perplexity, 1e-6)
    assert row["perplexity"]["standard_error"] == pytest.approx(perplexity * math.log(6) / 4, 1e-6)

    # Accuracy differs by 1/2 in both sequences, so the paired difference has no error.
    paired = difference(found, other)
    assert paired["accuracy"] == pytest.approx({"mean": 1 / 2, "standard_error": 0})
    # In each sequence one probability is halved.
    assert paired["loss"]["mean"] == pytest.approx(-math.log(2) / 2, 1e-6)
    assert paired["loss"]["standard_error"] == pytest.approx(0, abs=1e-6)


def test_masks_hide_residues_and_nothing_else():
    sequences = random_sequences(4)
    data = mask(sequences)
    ids, positions = data.inputs["token_ids"], data.inputs["mask_positions"]
    assert (ids == TOKENIZER.mask_token_id).sum() == 8  # so none is drawn twice
    restored = ids.copy()
    np.put_along_axis(restored, positions, data.labels, axis=1)
    for row, padding, sequence in zip(
        restored, data.inputs["padding_mask"], sequences, strict=True
    ):
        tokens = [0, *map(TOKENIZER.token_to_id, sequence), 2]
        assert row.tolist() == tokens + [1] * (12 - len(tokens))
        assert padding.sum() == len(tokens)
        assert padding[: len(tokens)].all()
    np.testing.assert_array_equal(mask(sequences).inputs["token_ids"], ids)


@slow_where_compiled
def test_every_row_is_the_score_of_its_model():
    keras.utils.set_random_seed(1)
    model = keras_hub.models.RobertaMaskedLM(
        keras_hub.models.RobertaBackbone(
            vocabulary_size=9,
            num_layers=1,
            num_heads=2,
            hidden_dim=6,
            intermediate_dim=7,
            max_sequence_length=12,
        )
    )
    rng = np.random.default_rng(7)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    plan = Plan(
        windows=(4,),
        num_features=8,
        batch_size=3,
        calibration_steps=2,
        tuning_steps=2,
        rate=1e-2,
    )
    heldout, train = mask(random_sequences(6)), mask(random_sequences(6))
    rows = []
    conversion.evaluate(model, heldout, train, plan, rows.append, Progress(disable=True))
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == [
        "original",
        "original, tuned",
        "FAVOR+",
        "twin 6, converted",
        "window 4, converted",
        "twin 6, calibrated",
        "window 4, calibrated",
        "twin 6, tuned",
        "window 4, tuned",
    ]
    for name, expected in (
        ("original", model),
        ("twin 6, converted", performerize(model, sliding_window=6)),
    ):
        found = score(expected, heldout, plan.batch_size).loss.mean()
        assert by_name[name]["loss"]["mean"] == pytest.approx(found, 1e-6)
    assert by_name["original"]["minus_original"]["loss"]["mean"] == 0
    # Every other row is another model, and so is every stage of training.
    assert len({round(row["loss"]["mean"], 6) for row in rows}) == len(rows)
    for row in rows[4::2]:
        twin = by_name[row["name"].replace("window 4", "twin 6")]
        for key, other in (("minus_twin", twin), ("minus_converted_twin", rows[3])):
            expected = row["loss"]["mean"] - other["loss"]["mean"]
            assert row[key]["loss"]["mean"] == pytest.approx(expected, abs=1e-12)
    seconds = [by_name[f"window 4, {s}"]["seconds"] for s in ("converted", "calibrated", "tuned")]
    assert seconds[0] == 0 < seconds[1] < seconds[2]
    assert conversion.results_table("model", rows).row_count == len(rows)


@pytest.mark.parametrize(("gain", "loss"), [(0.03, -0.009), (0.01, -0.011)])
def test_verdicts_need_two_standard_errors_and_allow_one_point(gain, loss):
    def accuracy(mean):
        return {"accuracy": {"mean": mean, "standard_error": 0.01}}

    rows = [
        {
            "name": "window 4, calibrated",
            "minus_converted_twin": accuracy(0.2),
            "minus_twin": accuracy(gain),
        },
        {"name": "window 4, tuned", "minus_original": accuracy(loss)},
    ]
    (line,) = conversion.verdicts(rows, Plan(windows=(4,)))
    assert "beats its twin as converted" in line
    assert ("does not beat its twin as calibrated" in line) == (gain < 0.02)
    assert ("not within a point" in line) == (loss < -0.01)
