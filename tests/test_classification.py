import json
import re

import keras
import numpy as np
import pytest
from killing import assert_same_curves, killed_and_whole, needs_kill
from recipes import CONFIGS, TINY, flags, overrides

from keras_performer.models import (
    ByteTokenizer,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSequenceClassifier,
    ProteinTokenizer,
)
from training import classification
from training.classification import Config, Corpus, Part, compare, crop, input_maker, main
from training.config import load_config
from training.data import digits
from training.data.list_ops import VOCABULARY, decode, encode, generate_list_ops

BACKEND = keras.config.backend()
PROTEINS = CONFIGS / "localisation.toml"
SMALL = {
    **TINY,
    "data.sequence_length": 32,
    "data.length_multiple": 0,
    "data.bucket_batches": 1,
    "data.text_field": "sequence",
    "data.label_field": "place",
    "head.dropout": 0.0,
    "training.steps": 10,
    "training.steps_per_epoch": 5,
    "training.warmup_steps": 2,
    "training.validation_examples": 16,
}
LETTERS = list("ACDEFGHIKLMNPQRSTVY")


def write_proteins(path, count=240):
    """Proteins with a W or without one, anywhere in them; two thirds have none."""
    rng = np.random.default_rng(7)
    rows = []
    for i in range(count):
        sequence = list(rng.choice(LETTERS, rng.integers(8, 28)))
        label = "without"
        if i % 3 == 0:
            label = "with"
            for place in rng.choice(len(sequence), 3, replace=False):
                sequence[place] = "W"
        rows.append({"sequence": "".join(sequence), "place": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data") / "p.jsonl")


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_letter_that_decides_is_learned(proteins, tmp_path):
    output = tmp_path / "run"
    changes = {"training.steps": 40, "training.steps_per_epoch": 20}
    options = [f"--config={PROTEINS}", f"--file={proteins}", *flags(SMALL | changes)]
    metrics = main([*options, f"--output={output}"])
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    model, majority = metrics["test"]["model"], metrics["test"]["majority"]
    assert model["accuracy"] > 0.95 > 0.8 > majority["accuracy"]
    assert model["accuracy_interval"][0] > majority["accuracy"]
    assert model["macro_f1"] > 0.9 > majority["macro_f1"]
    assert model["matthews"] > 0.9 and majority["matthews"] == 0
    assert model["cross_entropy"] < 0.5 * majority["cross_entropy"]
    assert list(metrics["test"]["classes"]) == ["with", "without"]
    assert (
        sum(row["examples"] for row in metrics["test"]["classes"].values())
        == (metrics["test"]["examples"])
    )
    assert sum(metrics[f"{part}_examples"] for part in ("train", "validation", "test")) == 240
    assert len(metrics["training"]["history"]) == 2
    assert metrics["reload_max_abs_difference"] <= 1e-5
    assert not (output / "backup").exists()

    # The preset takes strings and gives the classes that it names.
    reloaded = PerformerSequenceClassifier.from_preset(str(output / "preset"))
    classes = json.loads((output / "preset" / "classes.json").read_text(encoding="utf-8"))
    logits = reloaded.predict(["ACWDEFWGHWIKL", "ACDEFGHIKLMNP"], verbose=0)
    assert [classes[i] for i in logits.argmax(-1)] == ["with", "without"]


# What has to come back, beside weights: the place in the data, dropout, gradients and features.
RESUMED = {
    "data.length_multiple": 16,
    "data.bucket_batches": 3,
    "model.dropout": 0.2,
    "model.exact_window": 4,
    "head.dropout": 0.2,
    "training.steps": 12,
    "training.steps_per_epoch": 4,
    "training.accumulate": 2,
    "training.redraw_features_every": 3,
}


@pytest.mark.slow_on_torch
@needs_kill
@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_process_that_is_killed_in_an_epoch_goes_on(proteins, tmp_path):
    options = [f"--config={PROTEINS}", f"--file={proteins}", *flags(SMALL | RESUMED)]
    killed, whole = killed_and_whole("classification", options, tmp_path)
    assert_same_curves(killed, whole)
    figures = (metrics["test"]["model"]["cross_entropy"] for metrics in (killed, whole))
    assert next(figures) == pytest.approx(next(figures), abs=1e-5)


def masked_lm(folder, tokenizer=None, **changes):
    tokenizer = tokenizer or ProteinTokenizer()
    shape = {"num_layers": 1, "num_heads": 2, "hidden_dim": 24, "intermediate_dim": 20, **changes}
    backbone = PerformerEncoderBackbone(
        tokenizer.vocabulary_size(), num_features=4, seed=9, **shape
    )
    preprocessor = PerformerMaskedLMPreprocessor(tokenizer, sequence_length=16)
    PerformerMaskedLM(backbone, preprocessor=preprocessor).save_to_preset(str(folder))
    return backbone


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_a_masked_language_model_gives_its_encoder(proteins, tmp_path, eager):
    body = masked_lm(tmp_path / "mlm", ProteinTokenizer())
    changes = {"training.learning_rate": 1e-9, "model.dropout": 0.25, "training.weight_decay": 0.0}
    metrics = main(
        [f"--config={PROTEINS}", f"--file={proteins}", f"--output={tmp_path / 'run'}",
         f"--preset={tmp_path / 'mlm'}", *flags(SMALL | changes)]
    )  # fmt: skip
    model = PerformerSequenceClassifier.from_preset(str(tmp_path / "run" / "preset"))
    assert (model.backbone.hidden_dim, model.backbone.num_features) == (24, 4)
    assert model.backbone.dropout == 0.25 and model.num_classes == 2
    assert metrics["preset"] == str(tmp_path / "mlm")
    # Steps of no size: the body is that of the preset, not a new one.
    for a, b in zip(model.backbone.get_weights(), body.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def write_documents(path):
    rng = np.random.default_rng(3)
    rows = ["words,kind"]
    for i in range(120):
        word = ("é", "ou")[i % 2]
        rows.append(" ".join([word] * int(rng.integers(4, 40))) + f" {i},{i % 2}")
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_images_run_pixel_by_pixel_in_mixed_precision(tmp_path, eager):
    rng = np.random.default_rng(5)
    rows = []
    for i in range(120):
        pixels = rng.integers(0, 60, 20) + 190 * (i % 2)
        rows.append({"sequence": " ".join(map(str, pixels)), "place": ("dark", "bright")[i % 2]})
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = main(
        [f"--config={CONFIGS / 'digits.toml'}", f"--file={file}", f"--output={tmp_path / 'run'}",
         *flags(SMALL | {"training.learning_rate": 3e-2, "training.precision": "mixed_bfloat16"})]
    )  # fmt: skip
    assert metrics["test"]["model"]["accuracy"] > 0.9
    assert metrics["reload_max_abs_difference"] <= 1e-5
    model = PerformerSequenceClassifier.from_preset(
        str(tmp_path / "run" / "preset"), dtype="float32"
    )
    assert model.preprocessor is None and model.backbone.vocabulary_size == 256 + 4
    assert {weight.dtype for weight in model.trainable_weights} == {"float32"}


@pytest.mark.parametrize(
    "source, reader",
    [
        ("brown", "load_brown"),
        ("linux_doc", "load_linux_doc"),
        ("localisation_folds", "load_localisation"),
    ],
)
def test_the_fold_of_the_config_is_read(source, reader, monkeypatch):
    monkeypatch.setattr(classification, reader, lambda fold: fold)
    data = load(PROTEINS, **{"data.source": source, "data.fold": 3}).data
    assert classification.read_splits(data, None) == 3


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
@pytest.mark.parametrize("attention", ["softmax", "sliding_window"])
def test_documents_and_list_ops_run_with_the_baselines(attention, tmp_path, eager):
    """Bytes with softmax attention, ListOps with a window; patience ends neither early."""
    if attention == "softmax":
        config, file = CONFIGS / "documents_spam.toml", write_documents(tmp_path / "d.csv")
        fields = {"data.text_field": "words", "data.label_field": "kind", "model.far_bias": "0"}
    else:
        config, file = CONFIGS / "list_ops.toml", tmp_path / "l.jsonl"
        made = generate_list_ops(120, seed=4, max_depth=3, length_bounds=(4, 20))
        rows = ({"x": decode(made[i]), "y": int(made.labels[i])} for i in range(len(made)))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fields = {"data.text_field": "x", "data.label_field": "y"}
    changes = {**fields, "model.attention": attention, "training.patience": 2}
    metrics = main(
        [f"--config={config}", f"--file={file}", f"--output={tmp_path / 'run'}",
         *flags(SMALL | changes)]
    )  # fmt: skip
    assert metrics["attention"] == metrics["config"]["model"]["attention"] == attention
    assert len(metrics["training"]["history"]) == 2
    assert metrics["reload_max_abs_difference"] <= 1e-5
    model = PerformerSequenceClassifier.from_preset(str(tmp_path / "run" / "preset"))
    assert (model.preprocessor is None) == (attention == "sliding_window")
    sizes = {"softmax": ByteTokenizer().vocabulary_size(), "sliding_window": len(VOCABULARY)}
    assert model.backbone.vocabulary_size == sizes[attention]


def test_baselines_have_the_weights_of_the_performer():
    corpus = Corpus("proteins", "", ["a", "b"], {}, "")
    counts = []
    for attention in ("performer", "softmax", "sliding_window"):
        config = load(PROTEINS, **{"model.attention": attention})
        model = classification.build_model(config, corpus, None, None)
        counts.append(sum(int(np.prod(v.shape)) for v in model.trainable_variables))
    assert len(set(counts)) == 1


def load(path, **changes):
    return load_config(Config, path, overrides(SMALL | changes))


def test_shipped_configs_can_be_read_and_say_how_to_run_them():
    sources = []
    for path in sorted(CONFIGS.glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        if f"-m training.classification --config training/configs/{path.name}" in text:
            sources.append(load_config(Config, path).data.source)
    # The folds of a set that has splits of its own are run with the config of these.
    assert sorted([*sources, "localisation_folds"]) == sorted(classification.KINDS)


def test_long_texts_are_cropped_by_kind():
    row = np.arange(20)
    rng = np.random.default_rng(0)
    assert crop(row, 20, "proteins", rng) is row
    assert crop(row, 7, "proteins", rng).tolist() == [0, 1, 2, 3, 17, 18, 19]
    for kind in ("list_ops", "pixels"):
        assert crop(row, 7, kind, rng).tolist() == list(range(7))
    assert crop(row, 7, "documents", None).tolist() == list(range(7))
    windows = [crop(row, 7, "documents", rng) for _ in range(200)]
    assert all((np.diff(window) == 1).all() and len(window) == 7 for window in windows)
    assert {int(window[0]) for window in windows} == set(range(14))


def test_inputs_have_start_and_end_and_end_with_the_longest():
    config = load(
        PROTEINS,
        **{"data.sequence_length": 12, "data.length_multiple": 4, "data.bucket_batches": 3},
    )
    part = Part(["MK", "ACDEF", "A" * 6 + "C" * 30 + "D" * 6], np.zeros(3, "int32"))
    corpus = Corpus("proteins", "", ["a", "b"], {}, "")
    tokenizer = ProteinTokenizer()
    make_inputs = input_maker(config, corpus, part)
    x = make_inputs(np.array([0, 1]), None)
    m, k = tokenizer.token_to_id("M"), tokenizer.token_to_id("K")
    assert x["token_ids"].shape == (2, 8)
    assert x["token_ids"][0].tolist() == [1, m, k, 2, 0, 0, 0, 0]
    np.testing.assert_array_equal(x["padding_mask"].sum(1), [4, 7])
    x = make_inputs(np.array([2]), None)
    assert tokenizer.detokenize(x["token_ids"]) == ["A" * 5 + "D" * 5]

    part = Part([encode("[MAX 4 3 ]"), encode("[MIN " + "7 " * 30 + "]")], np.zeros(2, "int32"))
    make_inputs = input_maker(config, Corpus("list_ops", "", [], {}, ""), part)
    first, second = make_inputs(np.array([0, 1]), None)["token_ids"]
    assert decode(first) == "<cls> [MAX 4 3 ] <eos>"
    assert decode(second) == "<cls> [MIN " + "7 " * 9 + "<eos>"

    part = Part([digits.encode("0 51 255")], np.zeros(1, "int32"))
    make_inputs = input_maker(config, Corpus("pixels", "", [], {}, ""), part)
    assert make_inputs(np.array([0]), None)["token_ids"].tolist() == [[1, 4, 55, 259, 2, 0, 0, 0]]


class FixedModel:
    def __init__(self, logits):
        self.logits = logits

    def predict_on_batch(self, places):
        return self.logits[places]


def test_figures_agree_with_a_calculation_by_hand():
    train = Part([], np.array([0, 0, 0, 1, 1, 2, 2]))
    test = Part(["aaaa", "a", "aa", "aaa", "a"], np.array([0, 1, 2, 1, 0]))
    parts = {"train": train, "validation": test, "test": test}
    corpus = Corpus("documents", "", ["x", "y", "z"], parts, "")
    probabilities = np.array(
        [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [0, 0.5, 0.5], [0.8, 0.1, 0.1]]
    )
    model = FixedModel(np.log(probabilities + 1e-30))
    result = compare(model, corpus, lambda indices, rng: indices, batch_size=2)
    # Predicted: 0, 1, 0, 1, 0.
    assert result["model"]["accuracy"] == pytest.approx(4 / 5)
    assert result["model"]["macro_f1"] == pytest.approx((4 / 5 + 1 + 0) / 3)
    nats = [np.log(2), np.log(2), np.log(4), np.log(2), np.log(1.25)]
    assert result["model"]["cross_entropy"] == pytest.approx(np.mean(nats))
    assert result["majority"]["accuracy"] == pytest.approx(2 / 5)
    assert result["majority"]["macro_f1"] == pytest.approx(4 / 7 / 3)
    nats = -np.log([0.4, 0.3, 0.3, 0.3, 0.4])
    assert result["majority"]["cross_entropy"] == pytest.approx(nats.mean())
    assert result["classes"]["x"] == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "f1": 4 / 5, "examples": 2}
    )


GOOD = [{"sequence": "MKV" + "A" * i, "place": "xy"[i % 2]} for i in range(60)]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (None, ["--file=nothing.jsonl"], r"nothing\.jsonl: there is no such file"),
        (GOOD, ["--set=data.label_field=class"], r"there must be a text or number in 'class'"),
        ([{**row, "place": "x"} for row in GOOD], [], r"two classes or more. Received: \['x'\]"),
        ([*GOOD[:-1], {"sequence": "MK 3", "place": "x"}], [], r"p\.jsonl:60 is no protein seq"),
        ([*GOOD, {"sequence": "MKVWWWWWW", "place": "rare"}], [], "has the label 'rare', which"),
        (GOOD[:2], [], "documents are too few"),
        (GOOD, ["--set=training.batch_size=99"], "examples are left to train on, fewer than one"),
        (GOOD, ["--set=data.source=mnist"], r"'data\.source' must be one of localisation, loc"),
        (GOOD, ["--set=data.source=list_ops"], r"Words of ListOps are"),
        (GOOD, ["--set=data.source=digits"], r"Intensities are whole numbers from 0 to 255"),
        (GOOD, ["--set=data.source=brown", "--set=data.fold=5"], r"'data\.fold' must be from 0 t"),
        (GOOD, ["--set=data.sequence_length=2"], r"'data\.sequence_length' must be at least 8"),
        (GOOD, ["--set=head.pooling=last"], r"'head\.pooling' must be mean or first"),
        (GOOD, ["--set=head.poolin=mean"], r"no key 'head\.poolin'.*'head\.pooling'"),
        (GOOD, ["--set=model.num_heads=3"], "num_heads=3"),
        (GOOD, ["--preset=nothing"], "nothing"),
        (GOOD, ["--preset=PROTEINS", "--set=model.attention=softmax"], "preset's attention is"),
        (GOOD, ["--preset=BYTES"], "(?i)tokenizer|token ids"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_sentence_before_any_training(
    tmp_path, monkeypatch, rows, options, message
):
    monkeypatch.setattr(classification, "train", lambda *_: pytest.fail("training started"))
    if rows is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "p.jsonl").write_text(lines, encoding="utf-8")
        options = [f"--file={tmp_path / 'p.jsonl'}", *options]
    for name, tokenizer in (("PROTEINS", ProteinTokenizer), ("BYTES", ByteTokenizer)):
        if f"--preset={name}" in options:
            masked_lm(tmp_path / name, tokenizer())
            options[options.index(f"--preset={name}")] = f"--preset={tmp_path / name}"
    with pytest.raises(SystemExit, match=message) as error:
        main([f"--config={PROTEINS}", f"--output={tmp_path / 'run'}", *flags(SMALL), *options])
    assert re.match("error: [^\n]*$", str(error.value)), str(error.value)


def test_a_preset_whose_positions_end_too_early_leaves_earlier_figures(proteins, tmp_path):
    """It was found in `fit` only, when the figures of a finished run were deleted."""
    masked_lm(tmp_path / "mlm", position_embedding="learned", max_sequence_length=31)
    figures = tmp_path / "run" / "metrics.json"
    figures.parent.mkdir()
    figures.write_text("{}", encoding="utf-8")
    message = r"at most 31 tokens, and 'data\.sequence_length' is 32\. Pass --set .*=31 or less"
    with pytest.raises(SystemExit, match=message):
        main(
            [f"--config={PROTEINS}", f"--file={proteins}", f"--output={figures.parent}",
             f"--preset={tmp_path / 'mlm'}", *flags(SMALL)]
        )  # fmt: skip
    assert figures.read_text(encoding="utf-8") == "{}"


def test_a_preset_with_as_many_positions_as_the_config_asks_for_is_taken(tmp_path):
    masked_lm(tmp_path / "mlm", position_embedding="learned", max_sequence_length=32)
    corpus = Corpus("proteins", "", ["a", "b"], {}, "")
    model = classification.build_model(load(PROTEINS), corpus, str(tmp_path / "mlm"), None)
    assert model.backbone.max_sequence_length == 32
