"""The recipe that makes a Performer of a trained model, and the preset that is built with it."""

import importlib
import json
import re

import keras
import keras_hub
import numpy as np
import pytest
from recipes import CONFIGS, flags
from teachers import LETTERS, save_teacher
from tolerances import assert_exact, to_numpy

import keras_performer
from keras_performer.convert import PerformerRobertaMaskedLM, conversion_report
from training import distill, loop
from training.converted import Masked, Score
from training.distill import STAGES, compare, main, targets

CONFIG = CONFIGS / "antibody_distill.toml"
SMALL = {
    "data.num_masks": 3,
    "data.heldout_sequences": 8,
    "data.evaluation": "",
    "conversion.num_features": 8,
    "conversion.exact_window": 2,
    "conversion.feature_map_steps": 2,
    "conversion.attention_steps": 2,
    "training.steps": 4,
    "training.steps_per_epoch": 2,
    "training.batch_size": 4,
    "training.learning_rate": 1e-2,
    "training.warmup_steps": 1,
    "training.validation_sequences": 4,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small RoBERTa with a token for each letter, and sequences of these letters."""
    folder = tmp_path_factory.mktemp("files")
    rng = save_teacher(folder / "preset", dropout=0.1)
    sequences = {"".join(rng.choice(list(LETTERS), rng.integers(8, 15))) for _ in range(120)}
    # One too short, one too long, one with a letter that the model does not know.
    sequences |= {"AC", "A" * 15, "ACDEFGW"}
    lines = "".join(f">s{i}\n{s}\n" for i, s in enumerate(sorted(sequences)))
    (folder / "sequences.fasta").write_text(lines, encoding="utf-8")
    return folder


def arguments(files, output, *options, **changes):
    return [
        f"--config={CONFIG}",
        f"--preset={files / 'preset'}",
        f"--fasta={files / 'sequences.fasta'}",
        f"--output={output}",
        *flags(SMALL | changes),
        *options,
    ]


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory, eager_module):
    output = tmp_path_factory.mktemp("run")
    return main(arguments(files, output)), output


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_a_model_is_converted_calibrated_tuned_and_saved(files, finished):
    metrics, output = finished
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    assert not (output / "backup").exists()
    result = metrics["heldout"]["heldout"]
    losses = [result[stage]["loss"]["mean"] for stage in STAGES]
    assert len(set(losses)) == len(STAGES)
    assert losses[-1] < losses[0]  # the weights were random ones
    assert 90 < metrics["train_sequences"] < 120
    assert metrics["heldout_sequences"] == result["sequences"] == 8
    assert len(metrics["training"]["history"]) == 2
    assert metrics["reload_max_abs_difference"] <= 1e-5
    model = keras_hub.models.MaskedLM.from_preset(str(output / "preset"))
    assert type(model) is PerformerRobertaMaskedLM
    (row,) = conversion_report(model)
    assert (row.feature_map, row.num_features, row.window) == ("FavorPlus", 8, 2)
    # Every part was trained, the maps of the features too.
    before = keras_hub.models.MaskedLM.from_preset(str(files / "preset"))
    kernels = [m.backbone.get_layer("transformer_layer_0").get_weights() for m in (before, model)]
    assert len(kernels[1]) == len(kernels[0]) + 1


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_killed_run_goes_on_after_its_calibration(files, finished, tmp_path, monkeypatch):
    begin = loop._begin_epoch

    def kill(trainer, batches, seed, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        begin(trainer, batches, seed, epoch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "_begin_epoch", kill)
        main(arguments(files, tmp_path))
    assert (tmp_path / "backup" / "calibrated.weights.h5").is_file()
    monkeypatch.setattr(distill, "calibrated", lambda *_: pytest.fail("calibrated again"))
    metrics = main(arguments(files, tmp_path))
    for found, expected in zip(
        metrics["training"]["history"], finished[0]["training"]["history"], strict=True
    ):
        for key in ("loss", "val_loss", "accuracy"):
            assert found[key] == pytest.approx(expected[key], abs=1e-5)
    for stage in STAGES:
        found, expected = (x["heldout"]["heldout"][stage]["loss"] for x in (metrics, finished[0]))
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_that_to_the_truth_and_that_to_the_original(weight):
    rng = np.random.default_rng(3)
    theirs, ours = rng.normal(size=(2, 2, 3, 5))
    labels = np.array([[0, 4, 2], [1, 1, 3]])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)(
        targets(labels, theirs, weight), ours
    )
    log_ours = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    p_theirs = np.exp(theirs) / np.exp(theirs).sum(-1, keepdims=True)
    expected = 0.0
    for i in range(2):
        for j in range(3):
            expected -= (1 - weight) * log_ours[i, j, labels[i, j]] / 6
            expected -= weight * (p_theirs[i, j] * log_ours[i, j]).sum() / 6
    np.testing.assert_allclose(to_numpy(loss), expected, rtol=1e-5)


def test_stages_are_paired_and_frequencies_scored_by_hand():
    data = Masked({}, np.array([[0, 1], [1, 1]]))
    one = Score(np.array([0.5, 1.0]), np.array([1.0, 2.0]))
    two = Score(np.array([0.0, 0.5]), np.array([1.5, 2.5]))
    baseline = np.log([0.25, 0.75])
    result = compare({"original": one, "distilled": two}, baseline, data)
    gain = result["distilled"]["minus_original"]
    assert gain["accuracy"] == pytest.approx({"mean": -0.5, "standard_error": 0.0})
    assert gain["loss"] == pytest.approx({"mean": 0.5, "standard_error": 0.0})
    assert result["unigram"]["accuracy"]["mean"] == pytest.approx(3 / 4)
    nats = -(np.log(0.25) + 3 * np.log(0.75)) / 4
    assert result["unigram"]["loss"]["mean"] == pytest.approx(nats)
    assert (result["sequences"], result["masked_residues"]) == (2, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set=training.teacher_weight=1.5"], r"'training\.teacher_weight' must be between"),
        (["--set=conversion.trainable_projection=false"], r"feature_map_steps' must be 0 where"),
        (["--set=conversion.source=esm"], "one of sapiens-heavy"),
        (["--set=training.precision=mixed_bfloat16"], "float32, as the imported"),
        (["--set=training.batch_size=400"], "left to train on, fewer than one batch of 400"),
        (["--set=conversion.exact_windows=4"], r"Did you mean 'conversion\.exact_window'"),
        (["--set=conversion.exact_window=0", "--set=conversion.num_sink_tokens=2"], "exact_window"),
        (
            ["--set=training.redraw_features_every=2"],
            r"'training\.redraw_features_every' must be 0",
        ),
        (["--set=training.patience=1", "--set=training.validation_sequences=7"], "fewer than two"),
        (["--preset=nothing"], "nothing: there is no such folder"),
        (["--fasta=nothing"], "nothing"),
        (["--distribution=data"], "two models"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_any_training(
    files, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(distill, "calibrate_student", lambda *_: pytest.fail("training started"))
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments(files, tmp_path, *options))
    assert re.match("error: [^\n]*$", str(error.value)), str(error.value)


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_the_preset_loads_by_name_in_one_line(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from zoo.build import performer_antibody_small as build
    from zoo.build._preset import publish

    metrics, output = finished
    # What takes the network: the second set.
    scored = {part: metrics["heldout"]["heldout"] for part in build.SETS}
    record = build.make_record({**metrics, "heldout": scored})
    x = {
        "token_ids": np.array([[0, 4, 10, 6, 7, 2]], "int32"),
        "padding_mask": np.ones((1, 6), "int32"),
        "mask_positions": np.array([[2]], "int32"),
    }
    folder = publish(output / "preset", record, x, tmp_path)
    monkeypatch.setattr(importlib.import_module("keras_performer.presets"), "_ZOOS", (tmp_path,))
    assert keras_performer.presets()[build.NAME].task == "PerformerRobertaMaskedLM"
    keras_performer.verify(build.NAME)
    ours = PerformerRobertaMaskedLM.from_preset(build.NAME)
    theirs = keras_hub.models.MaskedLM.from_preset(keras_performer.preset_path(build.NAME))
    assert type(theirs) is PerformerRobertaMaskedLM
    assert_exact(ours(x, training=False), theirs(x, training=False))
    card = (folder / "README.md").read_text(encoding="utf-8")
    line = "from keras_performer.convert import PerformerRobertaMaskedLM"
    assert line in card
    loss = metrics["heldout"]["heldout"]["distilled"]["perplexity"]["mean"]
    assert record.metrics[0].model == loss

    content = bytearray((folder / "model.weights.h5").read_bytes())
    content[1000] ^= 1
    (folder / "model.weights.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"'model\.weights\.h5' is damaged"):
        PerformerRobertaMaskedLM.from_preset(build.NAME)


def test_cards_know_no_other_classes():
    pytest.importorskip("matplotlib")
    from zoo.build._record import task_class, task_home

    assert task_home("PerformerMaskedLM") == "keras_performer.models"
    assert task_class("PerformerRobertaMaskedLM") is PerformerRobertaMaskedLM
    with pytest.raises(ValueError, match="'task' must name a class"):
        task_home("PerformerT5")
