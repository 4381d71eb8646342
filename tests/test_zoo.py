"""Folders of the zoo: published, checked, downloaded, described, shipped."""

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import keras_hub
import numpy as np
import pytest
from tolerances import assert_exact, to_numpy

import keras_performer
from keras_performer import models
from keras_performer.models import (
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    ProteinTokenizer,
)
from keras_performer.presets import preset_path

if importlib.util.find_spec("matplotlib") is None:
    pytest.skip("needs matplotlib, of the extra [train]", allow_module_level=True)

from training import causal_lm
from training.backbones import preset_facts
from training.config import load_config
from zoo.build import (
    _causal_lm,
    _runs,
    performer_antibody_small,
    performer_localization_small,
    tables,
)
from zoo.build._card import card
from zoo.build._preset import move_to_url, publish, round_array, round_weights
from zoo.build._record import Data, Metric, Point, Record, read_record, task_class
from zoo.build._runs import facts, unfinished

ROOT = Path(__file__).resolve().parent.parent
PRESETS_MODULE = importlib.import_module("keras_performer.presets")
NAMES = sorted(path.parent.name for path in (ROOT / "zoo").glob("*/metrics.json"))

RECORD = Record(
    name="some_protein",
    task="PerformerMaskedLM",
    summary="A masked language model of proteins.",
    data=Data("two proteins", "CC0", "by hash", {"proteins to train on": 2, "held out": 1}),
    config={"seed": 1, "model": {"num_layers": 1}},
    hardware="one core",
    backend="Keras",
    wall_seconds=61.4,
    tokens_seen=1234567,
    steps=20,
    curve=[Point(10, 3.0, 3.1), Point(20, 2.5, 2.6)],
    evaluation="At 17 masked residues.",
    metrics=[
        Metric("perplexity", "lower", 17.25, None, 18.5),
        Metric("accuracy in %", "higher", 11.5, None, 9.5),
    ],
    softmax_twin="None: this is a test.",
    baseline="Unigram frequencies.",
    limits=["It knows nothing.", "It is small."],
    intended_use="Tests.",
    rebuild="python -m zoo.build.some_protein",
)


def inputs():
    rng = np.random.default_rng(0)
    return {
        "token_ids": rng.integers(0, 30, size=(2, 11)).astype("int32"),
        "padding_mask": np.array([[1] * 11, [1] * 7 + [0] * 4], "int32"),
        "mask_positions": np.array([[1, 4, 0], [2, 5, 6]], "int32"),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A task as a recipe leaves it, with an optimizer, and a zoo with its preset."""
    backbone = PerformerEncoderBackbone(30, 1, 3, 12, 17, num_features=13, dropout=0.1)
    preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=19)
    task = PerformerMaskedLM(backbone, preprocessor)
    rng = np.random.default_rng(0)
    task.set_weights([w + 0.1 * rng.standard_normal(w.shape) for w in task.get_weights()])
    task.optimizer.build(task.trainable_variables)
    folder = tmp_path_factory.mktemp("run") / "preset"
    task.save_to_preset(str(folder))
    zoo = tmp_path_factory.mktemp("zoo")
    publish(folder, RECORD, inputs(), zoo)
    return task, folder, zoo


@pytest.fixture
def zoo(made, tmp_path, monkeypatch):
    """A copy of the zoo, whose presets are found by name."""
    copy = tmp_path / "zoo"
    shutil.copytree(made[2], copy)
    monkeypatch.setattr(PRESETS_MODULE, "_ZOOS", (copy,))
    return copy


def datasets(path):
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


# Weights: float16 in the files, the declared type in the model.


def test_files_hold_float16_and_no_optimizer(made):
    _, before, zoo = made
    for name in ("model.weights.h5", "task.weights.h5"):
        old, new = datasets(before / name), datasets(zoo / RECORD.name / name)
        slots = {key: value for key, value in old.items() if key.startswith("optimizer/")}
        assert (len(slots) > 50) == (name == "task.weights.h5")
        if slots:  # A new optimizer has its step count and its rate, which are in every file.
            assert new.pop("optimizer/vars/0") == 0
            assert new.pop("optimizer/vars/1") == np.float32(made[0].optimizer.learning_rate)
        assert new.keys() == old.keys() - slots.keys()
        for key in new:
            value = old[key]
            assert value.dtype == "float32" and new[key].dtype == "float16"
            assert_exact(new[key], value.astype("float16"))
        assert (zoo / RECORD.name / name).stat().st_size < (before / name).stat().st_size / 2


@pytest.mark.parametrize("loader", [PerformerMaskedLM, keras_hub.models.MaskedLM])
def test_weights_load_in_their_declared_type(loader, made, zoo):
    task = loader.from_preset(keras_performer.preset_path(RECORD.name))
    assert type(task) is PerformerMaskedLM
    for new, old in zip(task.weights, made[0].weights, strict=True):
        assert new.dtype == old.dtype == "float32"
        # Rounded once, and not what was trained: the float16 came back exactly.
        assert_exact(to_numpy(new), to_numpy(old).astype("float16").astype("float32"))


def test_the_record_tells_size_and_rounding(made, zoo):
    weights = read_record(zoo / RECORD.name / "metrics.json").weights
    task = PerformerMaskedLM.from_preset(RECORD.name)
    before, after = (to_numpy(model(inputs(), training=False)) for model in (made[0], task))
    assert weights.parameters == task.count_params()
    assert weights.bytes == sum(
        path.stat().st_size for path in (zoo / RECORD.name).glob("*.weights.h5")
    )
    np.testing.assert_allclose(weights.largest_output, np.abs(before).max(), rtol=1e-5)
    np.testing.assert_allclose(
        weights.output_difference, np.abs(before - after).max(), rtol=1e-2, atol=1e-6
    )
    assert 0 < weights.output_difference < 5e-3 * weights.largest_output


def test_integers_and_what_float16_cannot_hold_stay(tmp_path):
    kept = {
        "a/vars/0": np.array([3, 2**31 - 1], "int32"),
        "a/vars/1": np.array([7, 2**32 - 1], "uint32"),
        "b/vars/0": np.array([1.0, 7e4], "float32"),
        "b/vars/1": np.array([3e-8, 1e-7], "float32"),
    }
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        for name, value in {**kept, "c/vars/0": np.float32([1, 1e-8])}.items():
            file[name] = value
        file["a/vars"].attrs["name"] = "a"
    round_weights(path)
    stored = datasets(path)
    for name, value in kept.items():
        assert stored[name].dtype == value.dtype
        assert_exact(stored[name], value)
    assert_exact(stored["c/vars/0"], np.float16([1, 0]))
    with h5py.File(path) as file:
        assert dict(file["a/vars"].attrs) == {"name": "a"}
    assert round_array(np.zeros((0, 3), "float32")).shape == (0, 3)


def test_publishing_checks_what_it_loads_and_keeps_the_old_folder(made, zoo, monkeypatch):
    preset = importlib.import_module("zoo.build._preset")
    before = {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}

    def wrong(path):
        round_weights(path)
        with h5py.File(path, "a") as file:
            if "layers/layer_normalization" in file:
                file["layers/layer_normalization/vars/0"][0] += 1

    monkeypatch.setattr(preset, "round_weights", wrong)
    with pytest.raises(ValueError, match=r"final_norm.*is not what was trained"):
        publish(made[1], RECORD, inputs(), zoo)
    for name in ("build", "../other", "Large", ""):
        with pytest.raises(ValueError, match="lower-case"):
            publish(made[1], dataclasses.replace(RECORD, name=name), inputs(), zoo)
    assert before == {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}


# Checksums.


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << (place % 8)
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_refused(zoo):
    folder = zoo / RECORD.name
    keras_performer.verify(folder)
    keras_performer.verify(RECORD.name)
    rng = np.random.default_rng(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 12
    for path in files:
        content = path.read_bytes()
        record = path.name == "SHA256SUMS"
        if record:
            places = [i for i in range(len(content)) if i % 11 == 0 or content[i] in b" \n"]
        else:
            places = rng.integers(0, len(content), 5)
        for place in places:
            flip(path, int(place))
            # A damaged record names itself, or the file of the line.
            named = "SHA256SUMS" if record else path.relative_to(folder).as_posix()
            with pytest.raises(ValueError, match=re.escape(named)):
                keras_performer.verify(folder)
            path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.weights.h5", "task.json", "README.md"])
@pytest.mark.parametrize("cls", ["PerformerMaskedLM", "PerformerEncoderBackbone",
                                 "ProteinTokenizer"])  # fmt: skip
def test_from_preset_refuses_before_it_loads(name, cls, zoo, monkeypatch):
    flip(zoo / RECORD.name / name, 1000)

    def fail(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("keras_hub.src.utils.preset_utils.get_preset_loader", fail)
    monkeypatch.setattr(h5py, "File", fail)
    for preset in (RECORD.name, zoo / RECORD.name):
        with pytest.raises(ValueError, match=rf"'{name}' is damaged.*Copy the preset again"):
            getattr(models, cls).from_preset(preset)


def test_missing_and_foreign_files_are_named(zoo):
    folder = zoo / RECORD.name
    (folder / ".DS_Store").write_bytes(b"left by an operating system")
    keras_performer.verify(folder)
    (folder / "model.weights.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'model\.weights\.json' is not on record"):
        PerformerMaskedLM.from_preset(folder)
    (folder / "model.weights.json").unlink()
    (folder / "assets" / "tokenizer" / "vocabulary.txt").unlink()
    with pytest.raises(ValueError, match=r"'assets/tokenizer/vocabulary\.txt' is missing"):
        PerformerMaskedLM.from_preset(folder)


def test_folders_without_a_record_load_and_cannot_be_verified(made):
    PerformerEncoderBackbone.from_preset(made[1], load_weights=False)
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        keras_performer.verify(made[1])
    with pytest.raises(ValueError, match=r"no preset called 'some_protien'"):
        keras_performer.verify("some_protien")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs the program sha256sum")
def test_sha256sum_reads_the_record(zoo):
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd=zoo / RECORD.name, check=True)


# Presets at a URL.


@pytest.fixture
def remote(zoo, tmp_path, monkeypatch):
    """A zoo whose preset lives in a zip file at a URL, an empty cache, and that file."""
    archive = tmp_path / "elsewhere" / "some protein.zip"
    archive.parent.mkdir()
    move_to_url(zoo / RECORD.name, archive.as_uri(), archive)
    cache = tmp_path / "cache"
    cache.mkdir()
    get_file = functools.partial(keras.utils.get_file, cache_dir=str(cache))
    monkeypatch.setattr(keras.utils, "get_file", get_file)
    return zoo, cache, archive


def test_presets_at_a_url_are_downloaded_once(made, remote):
    zoo, cache, archive = remote
    folder = zoo / RECORD.name
    files = {"README.md", "curve.png", "metrics.json", "remote.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert archive.as_uri() in (folder / "README.md").read_text(encoding="utf-8")
    assert keras_performer.presets()[RECORD.name].weights_bytes > 0
    assert not list(cache.iterdir())
    for preset in (RECORD.name, folder):
        task = PerformerMaskedLM.from_preset(preset)
        for new, old in zip(task.weights, made[0].weights, strict=True):
            assert_exact(to_numpy(new), to_numpy(old).astype("float16").astype("float32"))
        archive.unlink(missing_ok=True)  # so that the second time reads the cache
    keras_performer.verify(RECORD.name)
    local = Path(keras_performer.preset_path(RECORD.name))
    assert local.is_relative_to(cache)
    flip(local / "model.weights.h5", 1000)
    with pytest.raises(ValueError, match=r"'model\.weights\.h5' is damaged.*delete a downloaded"):
        PerformerMaskedLM.from_preset(RECORD.name)


def test_damaged_downloads_are_refused(remote):
    _, cache, archive = remote
    whole = archive.read_bytes()
    flip(archive, 1000)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'some_protein' was not loaded.*is damaged"):
            PerformerMaskedLM.from_preset(RECORD.name)
    assert not [path for path in (cache / "keras_performer").iterdir() if path.is_dir()]
    archive.write_bytes(whole)
    keras_performer.verify(RECORD.name)


def test_a_folder_is_moved_once_and_whole(remote):
    zoo, _, archive = remote
    before = archive.read_bytes()
    with pytest.raises(ValueError, match="was moved to a URL before"):
        move_to_url(zoo / RECORD.name, archive.as_uri(), archive)
    (zoo / RECORD.name / "remote.json").unlink()  # as if it had been killed on the way
    with pytest.raises(ValueError, match="has no SHA256SUMS"):
        move_to_url(zoo / RECORD.name, archive.as_uri(), archive)
    assert archive.read_bytes() == before


def test_archives_are_zip_files(zoo, tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.zip'"):
        move_to_url(zoo / RECORD.name, "https://example.org/x.tar", tmp_path / "x.tar")
    keras_performer.verify(RECORD.name)


# Discovery, cards and tables.


def test_presets_are_described(zoo):
    found = keras_performer.presets()
    assert list(found) == [RECORD.name]
    preset = found[RECORD.name]
    assert preset.task == "PerformerMaskedLM" and preset.summary == RECORD.summary
    assert preset.metrics == {"perplexity": 17.25, "accuracy in %": 11.5}
    assert str(preset).startswith(f"PerformerMaskedLM, {preset.parameters:,} parameters, 0.0")
    assert str(preset).endswith(" MB: perplexity 17.25, accuracy in % 11.5")
    path = zoo / RECORD.name / "metrics.json"
    path.write_text('{"task": 3}')
    with pytest.raises(ValueError, match=r"metrics\.json.*KeyError: 'summary'"):
        keras_performer.presets()


def test_the_card_tells_everything(zoo):
    folder = zoo / RECORD.name
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == card(folder)
    task = PerformerMaskedLM.from_preset(RECORD.name)
    expected = [
        *(RECORD.summary, RECORD.data.source, RECORD.data.licence, RECORD.data.split),
        *(RECORD.hardware, RECORD.backend, RECORD.evaluation, RECORD.softmax_twin),
        *(RECORD.baseline, RECORD.intended_use, RECORD.rebuild, *RECORD.limits),
        *("2 proteins to train on, 1 held out", '"num_layers": 1', "1,234,567 tokens", "20 steps"),
        *("61 seconds", "(curve.png)", f"{task.count_params():,} parameters"),
        "| perplexity (lower is better) | 17.25 | – | 18.5 |",
        "| accuracy in % (higher is better) | 11.5 | – | 9.5 |",
    ]
    for phrase in expected:
        assert phrase in text, phrase
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert (f"| {name} | `{digest}` |" in text) == name.endswith(".weights.h5")
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def changed(*keys, value=None):
    """A `metrics.json` with one value replaced, or left out."""
    record = json.loads(json.dumps(dataclasses.asdict(RECORD)))
    weights = {"parameters": 5, "bytes": 10, "largest_output": 1.0, "output_difference": 0.0}
    record["weights"] = weights
    part = record
    for key in keys[:-1]:
        part = part[key]
    if value is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    return record


BROKEN = {
    "'softmax_twin' is missing": changed("softmax_twin"),
    r"'metrics\[1\]\.softmax_twin' is missing": changed("metrics", 1, "softmax_twin"),
    "'data.licence' is missing": changed("data", "licence"),
    "'data.licence' must be a str, not empty": changed("data", "licence", value=" "),
    "'data.counts.held out' must be a int": changed("data", "counts", "held out", value=1.5),
    "'data' must be an object": changed("data", value="Swiss-Prot"),
    "'weights' is missing": changed("weights"),
    "'weights.bytes' is missing": changed("weights", "bytes"),
    "'hardware_used' is unknown": changed("hardware_used", value="x"),
    "'metrics' must have 1": changed("metrics", value=[]),
    "'limits' must have 1": changed("limits", value=[]),
    "'curve' must have 2": changed("curve", 0),
    "'config' must be": changed("config", value={}),
    r"'metrics\[0\]\.better' must be": changed("metrics", 0, "better", value="large"),
    r"'metrics\[0\]\.model' must be a finite number": changed("metrics", 0, "model", value=np.nan),
    r"'curve\[0\]\.val_loss' must be a finite": changed("curve", 0, "val_loss", value="2"),
    "'name' is 'other', and the folder 'some_protein'": changed("name", value="other"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_incomplete_records_are_refused(message, tmp_path):
    path = tmp_path / RECORD.name / "metrics.json"
    path.parent.mkdir()
    path.write_text(json.dumps(changed("steps", value=20)), encoding="utf-8")
    assert read_record(path).metrics == RECORD.metrics
    path.write_text(json.dumps(BROKEN[message]), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"metrics\.json: .*{message}"):
        read_record(path)


def test_the_table_has_a_row_for_each_preset(zoo, tmp_path):
    assert tables.table(tmp_path, "") == "There are no presets yet."
    row = tables.table(zoo, "zoo/").splitlines()[2]
    assert row.startswith("| [`some_protein`](zoo/some_protein/README.md) | `PerformerMaskedLM` |")
    assert row.endswith("| perplexity | 17.25 | – | 18.5 |")
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    new = tables.with_table(text, "new", tmp_path)
    assert new == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter"
    with pytest.raises(ValueError, match="must have a line"):
        tables.with_table(new.replace(tables.END, ""), "new", tmp_path)


# The runs that presets are made of.


def epochs(*losses):
    return [{"loss": x, "val_loss": x, "val_accuracy": 0.5, "seconds": 2.0} for x in losses]


def test_a_card_says_how_far_the_twin_came_and_what_all_processes_took(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {
        "config": {"training": {"steps": 40, "steps_per_epoch": 10, "batch_size": 2}},
        "training": {"history": epochs(3.0, 2.0), "fit_seconds": 1.5},
        **{"seconds": 2.0, "keras": "3", "backend": "torch", "machine": "one core"},
    }
    # The last of the processes took two seconds, one and a half of them of the training.
    assert facts(model, 3.0)["wall_seconds"] == 2 * 2.0 + 0.5
    assert unfinished(model, "twin") == "not trained yet."
    history = tmp_path / "runs" / "twin" / "history.jsonl"
    history.parent.mkdir(parents=True)
    # A twin may have more steps than the run it is compared with.
    planned = {"config": {"training": model["config"]["training"] | {"steps": 50}}}
    (history.parent / "run.json").write_text(json.dumps(planned), encoding="utf-8")
    for theirs, made, compared in (
        ((), None, None),
        ((2.5,), 10, (10, 2.5, 3.0)),
        ((2.5, 1.5, 1.0), 30, (20, 1.5, 2.0)),
    ):
        history.write_text("".join(json.dumps(row) + "\n" for row in epochs(*theirs)))
        text = unfinished(model, "twin")
        if made is None:
            assert text == "not trained yet."
            continue
        steps, their_loss, our_loss = compared
        assert f"made {made} of 50 steps. After {steps} its loss" in text
        assert f"was {their_loss:.4f} (accuracy 50.0%), and this model's {our_loss:.4f}" in text


def test_a_finished_run_is_used_though_its_config_has_new_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "CONFIGS", ROOT / "training" / "configs")
    monkeypatch.setattr(causal_lm, "main", lambda arguments: "trained anew")
    config = load_config(causal_lm.Config, _runs.CONFIGS / "text_causal_lm.toml")
    metrics = {"config": dataclasses.asdict(config)}
    del metrics["config"]["data"]["text_field"]
    output = Path("runs") / "text"
    output.mkdir(parents=True)
    (output / "metrics.json").write_text(json.dumps(metrics))
    assert _runs.run(causal_lm, "text_causal_lm.toml", "text") == (metrics, output)
    assert _runs.run(causal_lm, "text_causal_lm.toml", "text", "seed=2")[0] == "trained anew"
    (output / "backup").mkdir()
    assert _runs.run(causal_lm, "text_causal_lm.toml", "text")[0] == "trained anew"


def test_a_run_on_a_preset_whose_weights_changed_is_trained_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_runs, "CONFIGS", ROOT / "training" / "configs")
    monkeypatch.setattr(causal_lm, "main", lambda arguments: "trained anew")
    weights = Path("start") / "model.weights.h5"
    weights.parent.mkdir()
    weights.write_bytes(b"some")
    config = load_config(causal_lm.Config, _runs.CONFIGS / "text_causal_lm.toml")
    metrics = {"config": dataclasses.asdict(config), **preset_facts("start")}
    output = Path("runs") / "text"
    output.mkdir(parents=True)
    (output / "metrics.json").write_text(json.dumps(metrics))
    build = functools.partial(_runs.run, causal_lm, "text_causal_lm.toml", "text")
    assert build(preset="start")[0] == metrics
    assert build()[0] == "trained anew"
    weights.write_bytes(b"others")
    assert build(preset="start")[0] == "trained anew"


def test_a_twin_goes_on_from_a_twin(monkeypatch):
    made = []

    def run(recipe, config, name, *overrides, preset=None):
        made.append((config, name, overrides[-1:], preset))
        return {"name": name}, Path("runs") / name

    for module in (_runs, performer_localization_small):
        monkeypatch.setattr(module, "run", run)
    model, output, twin, _ = _runs.run_with_twin(
        causal_lm, "own.toml", "own", [], start=performer_localization_small.run_encoder
    )
    assert (model["name"], output.name, twin["name"]) == ("own", "own", "own_softmax")
    softmax = ("model.attention=softmax",)
    encoder = "performer_localization_small_encoder"
    pretraining = performer_localization_small.PRETRAINING
    assert made == [
        (pretraining, encoder, performer_localization_small.ENCODER[-1:], None),
        ("own.toml", "own", (), f"runs/{encoder}/preset"),
        (pretraining, f"{encoder}_softmax", softmax, None),
        ("own.toml", "own_softmax", softmax, f"runs/{encoder}_softmax/preset"),
    ]


def test_what_tells_presets_apart():
    assert (
        preset_facts("performer_tiny")["preset_sha256"]
        != (preset_facts("performer_protein_small")["preset_sha256"])
    )
    name, folder = preset_facts("performer_tiny"), preset_facts(preset_path("performer_tiny"))
    assert name["preset_sha256"] == folder["preset_sha256"]
    assert preset_facts("hf://someone/else")["preset_sha256"] == "hf://someone/else"
    assert preset_facts(None) == {"preset": None, "preset_sha256": None}


def test_the_card_of_a_causal_twin_says_how_many_windows_it_had(monkeypatch):
    monkeypatch.setattr(_causal_lm, "CONFIGS", ROOT / "training" / "configs")
    monkeypatch.setattr(_causal_lm, "run_with_twin", lambda *arguments: arguments[-2:])
    overrides, phrase = _causal_lm.run_causal_lm("protein_causal_lm.toml", "proteins", [])
    assert "training.batch_size=8" in overrides
    assert "windows of 1,024 tokens, 8 times as many windows a step: same tokens" in phrase


def test_a_trial_does_not_replace_the_published_preset(tmp_path, monkeypatch, capsys):
    build, published = performer_antibody_small, []
    monkeypatch.setattr(build, "run", lambda *arguments: ({}, Path(arguments[2])))
    for name in ("make_record", "heldout_inputs"):
        monkeypatch.setattr(build, name, lambda _: None)
    monkeypatch.setattr(build, "publish", lambda *arguments: published.append(arguments))
    monkeypatch.setattr(build.tables, "main", lambda: published.append("tables"))
    for zoo in ([], [f"--zoo={ROOT / 'tests' / '..' / 'zoo'}"]):
        with pytest.raises(SystemExit):
            build.main(["--set=seed=2", *zoo])
        assert "Pass --zoo with another folder" in capsys.readouterr().err
    assert not published
    # A folder that is not there yet is made before the training.
    build.main(["--set=seed=2", f"--zoo={tmp_path / 'trials'}"])
    trial = Path("performer_antibody_small_trial") / "preset"
    assert published == [(trial, None, None, tmp_path / "trials")]
    assert (tmp_path / "trials").is_dir()


# The zoo that is shipped.


@pytest.mark.parametrize("path", tables.READMES, ids=str)
def test_the_tables_are_current(path):
    text = path.read_text(encoding="utf-8")
    table = tables.table(ROOT / "zoo", tables.READMES[path])
    assert text == tables.with_table(text, table, path), "run `python -m zoo.build.tables`"


@pytest.mark.parametrize("name", NAMES)
def test_shipped_presets_are_whole(name):
    folder = ROOT / "zoo" / name
    record = read_record(folder / "metrics.json")
    assert (folder / "README.md").read_text(encoding="utf-8") == card(folder)
    assert issubclass(task_class(record.task), keras_hub.models.Task)
    assert record.rebuild.startswith(f"python -m zoo.build.{name}")
    assert (ROOT / "zoo" / "build" / f"{name}.py").is_file()
    if not (folder / "remote.json").is_file():
        keras_performer.verify(folder)
        for path in folder.glob("*.weights.h5"):
            stored = datasets(path)
            optimizer = {key: value for key, value in stored.items() if key.startswith("optimizer")}
            assert optimizer.keys() <= {"optimizer/vars/0", "optimizer/vars/1"}
            assert optimizer.get("optimizer/vars/0", 0) == 0
            assert "float16" in {value.dtype.name for value in stored.values()}


def test_the_zoo_stays_small():
    files = [path for path in (ROOT / "zoo").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 80e6


def test_performer_tiny_beats_residue_frequencies():
    record = read_record(ROOT / "zoo" / "performer_tiny" / "metrics.json")
    perplexity = record.metrics[0]
    assert perplexity.name == "perplexity" and perplexity.model < perplexity.baseline - 0.1
    assert record.weights.parameters < 10_000 and record.weights.bytes < 100_000
    task = PerformerMaskedLM.from_preset("performer_tiny")
    assert {weight.dtype for weight in task.weights} == {"float32"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_no_ignore_rule_matches_the_zoo(tmp_path):
    rules = [path for path in (ROOT / ".gitignore", ROOT / "zoo" / ".gitignore") if path.is_file()]
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    for path in rules:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    files = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "zoo").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    files += ["zoo/build/new_preset.py", "zoo/new_preset/model.weights.h5"]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    result = subprocess.run(
        command, input="\n".join(files), text=True, capture_output=True, cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (1, ""), result.stderr


def test_nothing_imports_the_builders():
    for folder in ("keras_performer", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            found = re.search(r"^\s*(from|import) zoo\b", text, re.MULTILINE)
            assert not found, f"{path}: {found}"


# The wheel.

LOAD_BY_NAME = """
import json, sys
import keras_performer
from keras_performer.models import PerformerMaskedLM
assert keras_performer.__file__.startswith(sys.argv[1]), keras_performer.__file__
assert keras_performer.preset_path("some_protein").startswith(sys.argv[1])
task = PerformerMaskedLM.from_preset("some_protein")
print(json.dumps([sorted(keras_performer.presets()), task.count_params()]))
"""


def has_setuptools():
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.slow_on_torch
@pytest.mark.slow_on_jax
@pytest.mark.skipif(not has_setuptools(), reason="needs setuptools 77 (.ci/run checks its wheel)")
def test_presets_load_by_name_from_a_wheel(made, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    for name in ("keras_performer", "zoo"):
        shutil.copytree(ROOT / name, project / name, ignore=ignored)
    shutil.copytree(made[2] / RECORD.name, project / "zoo" / RECORD.name)
    build = "import setuptools.build_meta as build; build.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=project, check=True, capture_output=True)
    (wheel,) = project.glob("*.whl")
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(target)
    shipped = target / "keras_performer" / "_zoo"
    assert sorted(path.name for path in shipped.iterdir()) == sorted([*NAMES, RECORD.name])
    for name in (*NAMES, RECORD.name):
        files = {path.name for path in (project / "zoo" / name).rglob("*")}
        assert {path.name for path in (shipped / name).rglob("*")} == files
    environment = {**os.environ, "PYTHONPATH": str(target)}
    result = subprocess.run(
        [sys.executable, "-c", LOAD_BY_NAME, str(target)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    names, parameters = json.loads(result.stdout.splitlines()[-1])
    assert names == sorted([*NAMES, RECORD.name]) and parameters == made[0].count_params()
