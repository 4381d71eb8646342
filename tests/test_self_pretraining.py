import json
import re

import numpy as np
import pytest
from killing import assert_same_curves, killed_and_whole, needs_kill
from recipes import CONFIGS, TINY, flags, overrides

from keras_performer.models import PerformerMaskedLM
from training import classification, self_pretraining
from training.config import load_config
from training.data.examples import split_of
from training.data.list_ops import VOCABULARY
from training.self_pretraining import Config, Rows, main

LIST_OPS = CONFIGS / "list_ops_pretraining.toml"
SMALL = {
    **TINY,
    "data.sequence_length": 24,
    "data.length_multiple": 0,
    "data.bucket_batches": 1,
    "training.steps": 12,
    "training.steps_per_epoch": 6,
    "training.learning_rate": 5e-2,
    "training.warmup_steps": 2,
    "training.precision": "float32",
    "training.validation_examples": 16,
}


def write_examples(path, letters, opening="", closing=""):
    """Examples of one letter each, of which one tells all others."""
    rows = [
        {"text": opening + letters[i % len(letters)] * (4 + i % 17) + closing, "label": "ab"[i % 2]}
        for i in range(340)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(config, examples, output, *options, **changes):
    files = [f"--config={config}", f"--file={examples}", f"--output={output}"]
    return main([*files, *flags(SMALL | changes), *options])


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_list_ops_start_from_what_their_masked_tokens_taught(tmp_path, eager):
    examples = write_examples(tmp_path / "l.jsonl", [f"{i} " for i in range(10)], "[MAX ", "]")
    metrics = run(LIST_OPS, examples, tmp_path / "pretrained")
    output = tmp_path / "pretrained"
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    model, unigram = metrics["test"]["model"], metrics["test"]["unigram"]
    assert model["cross_entropy"] < 0.85 * unigram["cross_entropy"]
    difference = metrics["test"]["difference"]
    assert difference["mean"] > 5 * difference["standard_error"]
    assert sum(metrics[f"{part}_examples"] for part in ("train", "validation", "test")) == 340
    assert metrics["reload_max_abs_difference"] <= 1e-5
    assert not (output / "backup").exists()
    pretrained = PerformerMaskedLM.from_preset(str(output / "preset"))
    assert pretrained.preprocessor is None
    assert pretrained.backbone.vocabulary_size == len(VOCABULARY)

    config = load_config(classification.Config, CONFIGS / "list_ops.toml", overrides(SMALL))
    corpus = classification.read_corpus(config, examples)
    tuned = classification.build_model(config, corpus, str(output / "preset"), None)
    pairs = zip(tuned.backbone.get_weights(), pretrained.backbone.get_weights(), strict=True)
    assert all((a == b).all() for a, b in pairs)


@pytest.mark.slow_on_jax
def test_a_classification_config_will_do_and_its_preset_takes_strings(tmp_path, eager):
    examples = write_examples(tmp_path / "p.jsonl", "ACDEFGHIKL")
    changes = {"data.text_field": "text", "data.label_field": "label", "data.mask_rate": 0.3}
    changes.update({"training.steps": 2, "training.steps_per_epoch": 2, "training.warmup_steps": 0})
    metrics = run(CONFIGS / "localisation.toml", examples, tmp_path / "run", **changes)
    assert metrics["config"]["data"]["mask_rate"] == 0.3
    model = PerformerMaskedLM.from_preset(str(tmp_path / "run" / "preset"))
    assert model.preprocessor.mask_selection_rate == 0.3
    assert model.predict(["ACD", "MKTAYIA"], verbose=0).shape[::2] == (2, 30)


@pytest.mark.slow_on_torch
@needs_kill
@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_process_that_is_killed_in_an_epoch_goes_on(tmp_path):
    changes = {
        "data.length_multiple": 8,
        "data.bucket_batches": 3,
        "model.dropout": 0.2,
        "model.exact_window": 4,
        "training.steps_per_epoch": 4,
        "training.accumulate": 2,
        "training.redraw_features_every": 3,
    }
    examples = write_examples(tmp_path / "l.jsonl", [f"{i} " for i in range(10)], "[MAX ", "]")
    options = [f"--config={LIST_OPS}", f"--file={examples}", *flags(SMALL | changes)]
    killed, whole = killed_and_whole("self_pretraining", options, tmp_path)
    assert_same_curves(killed, whole)
    figures = (metrics["test"]["model"]["cross_entropy"] for metrics in (killed, whole))
    assert next(figures) == pytest.approx(next(figures), abs=1e-5)


def test_documents_become_tokens_when_they_are_read():
    part = classification.Part(["é!", "ab"], np.zeros(2, "int32"))
    rows = Rows(part, classification.make_tokenizer("documents"))
    assert [row.tolist() for row in rows] == [[200, 174, 38], [102, 103]]
    assert rows[0].dtype == "int32" and len(rows) == 2


def test_the_shipped_configs_agree():
    """The encoder that is pretrained is that of list_ops.toml, and reads the same inputs."""
    pretraining = load_config(Config, LIST_OPS)
    tuning = load_config(classification.Config, CONFIGS / "list_ops.toml", ["model.dropout=0.0"])
    assert pretraining.model == tuning.model
    for name in vars(tuning.data):
        assert getattr(pretraining.data, name) == getattr(tuning.data, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set=data.mask_rate=1.0"], r"'data\.mask_rate' must be between 0 and 1"),
        (["--set=data.random_token_rate=0.5"], r"'data\.random_token_rate' must be at least 0"),
        (["--set=data.masking=0.1"], r"no key 'data\.masking'"),
        (["--set=training.batch_size=999"], "are left to train on, fewer than one batch"),
        (["--set=model.num_heads=3"], "num_heads=3"),
        (["--file=ONE"], "one example falls into the test split"),
        (["--file=nothing.jsonl"], r"nothing\.jsonl: there is no such file"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_any_training(
    tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(self_pretraining, "train", lambda *_: pytest.fail("training started"))
    examples = write_examples(tmp_path / "l.jsonl", ["1 ", "2 "], "[MAX ", "]")
    if options == ["--file=ONE"]:
        texts = [f"[MAX {i} {j} ]" for i in range(10) for j in range(10)]
        texts = [t for t in texts if split_of(t) == "train"] + [
            next(t for t in texts if split_of(t) == split) for split in ("validation", "test")
        ]
        rows = (json.dumps({"text": t, "label": "ab"[i % 2]}) for i, t in enumerate(texts))
        (tmp_path / "one.jsonl").write_text("\n".join(rows), encoding="utf-8")
        options = [f"--file={tmp_path / 'one.jsonl'}"]
    with pytest.raises(SystemExit, match=message) as error:
        run(LIST_OPS, examples, tmp_path / "run", *options)
    assert re.match("error: [^\n]*$", str(error.value)), str(error.value)
