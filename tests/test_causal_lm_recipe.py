import json
import re

import numpy as np
import pytest
from killing import assert_same_curves, killed_and_whole, needs_kill
from recipes import CONFIGS, TINY, flags, overrides
from tolerances import assert_close

from keras_performer.models import (
    ByteTokenizer,
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
)
from training import causal_lm
from training.causal_lm import Config, Corpus, compare, main, unigram_log_probabilities
from training.config import load_config
from training.data.byte_pairs import learn_byte_pairs
from training.data.examples import SPLITS, Example
from training.data.packed_windows import PackedWindows

CONFIG = CONFIGS / "text_causal_lm.toml"
SMALL = {
    **TINY,
    "data.sequence_length": 48,
    "data.heldout_share": 0.3,
    "data.vocabulary_size": 0,
    "model.hidden_dim": 32,
    "model.intermediate_dim": 32,
    "model.num_features": 16,
    "model.exact_window": 4,
    "training.steps": 60,
    "training.steps_per_epoch": 20,
    "training.batch_size": 8,
    "training.accumulate": 1,
    "training.warmup_steps": 5,
    "training.precision": "float32",
    "training.validation_windows": 8,
}


def sequences(seed, count=9):
    rng = np.random.default_rng(seed)
    return [np.array([1, *rng.integers(5, 12, rng.integers(1, 17)), 2]) for _ in range(count)]


def test_windows_hold_every_token_once_and_end_every_sequence():
    parts = sequences(0)
    windows = PackedWindows(parts, 7, pad_token_id=0)
    rows = list(windows.batches(4))
    tokens = np.concatenate([x["token_ids"] for _, (x, _, _) in rows]).ravel()
    mask = np.concatenate([x["padding_mask"] for _, (x, _, _) in rows]).ravel()
    assert len(tokens) == 7 * len(windows) and mask.sum() == windows.num_tokens
    np.testing.assert_array_equal(tokens[: windows.num_tokens], np.concatenate(parts))
    assert not tokens[windows.num_tokens :].any() and mask[: windows.num_tokens].all()
    y = np.concatenate([y for _, (_, y, _) in rows]).ravel()
    weights = np.concatenate([w for _, (_, _, w) in rows]).ravel()
    # All tokens but the first of each sequence are predicted, by the one before.
    expected = np.concatenate([part[1:] for part in parts])
    np.testing.assert_array_equal(y[weights > 0], expected)
    assert weights[: windows.num_tokens].sum() == windows.num_tokens - len(parts)
    owners = np.concatenate([windows.sequences_of(i) for i in range(len(windows))])
    np.testing.assert_array_equal(
        owners[: windows.num_tokens], np.repeat(np.arange(9), [len(part) for part in parts])
    )


def test_moved_windows_stay_inside():
    windows = PackedWindows(sequences(0), 7, pad_token_id=0)
    indices = np.arange(len(windows)).repeat(50)
    x, _, _ = windows.read(indices, np.random.default_rng(0))
    assert x["padding_mask"].all()
    assert len({row.tobytes() for row in x["token_ids"]}) > 3 * len(windows)


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "performer", "exact_window": 3},
        {"attention": "performer", "reversible": True},
        {"attention": "softmax", "position_embedding": "learned", "max_sequence_length": 40},
        {"attention": "sliding_window", "sliding_window": 4},
    ],
)
def test_a_packed_sequence_gets_what_it_gets_alone(options):
    backbone = PerformerDecoderBackbone(
        vocabulary_size=13, num_layers=2, num_heads=2, hidden_dim=16, intermediate_dim=24,
        num_features=8, seed=3, **options,
    )  # fmt: skip
    packed = backbone.packed()
    assert {id(v) for v in packed.weights} == {id(v) for v in backbone.weights}
    parts = sequences(1, count=3)
    length = sum(map(len, parts)) + 2
    x, _, _ = PackedWindows(parts, length, pad_token_id=0).read([0])
    outputs = packed.predict_on_batch(x)[0]
    ids = np.stack([np.pad(part, (0, length - len(part))) for part in parts]).astype("int32")
    mask = np.stack([np.arange(length) < len(part) for part in parts]).astype("int32")
    alone = backbone.predict_on_batch({"token_ids": ids, "padding_mask": mask})
    start = 0
    for part, expected in zip(parts, alone, strict=True):
        assert_close(outputs[start : start + len(part)], expected[: len(part)])
        start += len(part)


def write_text(path):
    """Lines that count on: after the first letter every byte is known."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    starts = rng.integers(0, 13, 400)
    path.write_text("".join(letters[i : i + 12] + "\n" for i in starts), encoding="utf-8")
    return path


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_the_job_learns_writes_and_generates(tmp_path):
    text = write_text(tmp_path / "t.txt")
    output = tmp_path / "run"
    metrics = main([f"--config={CONFIG}", f"--file={text}", f"--output={output}", *flags(SMALL)])
    assert json.loads((output / "metrics.json").read_text(encoding="utf-8")) == metrics
    model, unigram = metrics["test"]["model"], metrics["test"]["unigram"]
    assert model["bits_per_byte"] < 0.7 * unigram["bits_per_byte"]
    assert model["accuracy"] > 0.4 > unigram["accuracy"]
    assert metrics["reload_max_abs_difference"] <= 1e-5
    assert len(metrics["training"]["history"]) == 3
    assert text.read_text(encoding="utf-8")[-2000:].count(metrics["sample"][:12])
    assert not (output / "backup").exists()
    reloaded = PerformerCausalLM.from_preset(str(output / "preset"))
    reloaded.compile(sampler="greedy")
    written = reloaded.generate("\nabcd", max_length=12)
    assert written[:5] == "\nabcd" and len(written) > 5


@pytest.mark.slow_on_torch
@needs_kill
@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_process_that_is_killed_in_an_epoch_goes_on(tmp_path):
    changes = {
        "model.dropout": 0.2,
        "training.steps": 12,
        "training.steps_per_epoch": 4,
        "training.accumulate": 2,
        "training.redraw_features_every": 3,
    }
    text = write_text(tmp_path / "t.txt")
    options = [f"--config={CONFIG}", f"--file={text}", *flags(SMALL | changes)]
    killed, whole = killed_and_whole("causal_lm", options, tmp_path)
    assert_same_curves(killed, whole)
    figures = (metrics["test"]["model"]["cross_entropy"] for metrics in (killed, whole))
    assert next(figures) == pytest.approx(next(figures), abs=1e-5)


def save_byte_model(folder, sequence_length=16, **options):
    tokenizer = ByteTokenizer()
    backbone = PerformerDecoderBackbone(
        tokenizer.vocabulary_size(), num_layers=1, num_heads=2, hidden_dim=24, intermediate_dim=20,
        num_features=4, seed=9, **options,
    )  # fmt: skip
    preprocessor = PerformerCausalLMPreprocessor(tokenizer, sequence_length)
    PerformerCausalLM(backbone, preprocessor).save_to_preset(str(folder))
    return backbone


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_preset_gives_its_decoder_and_its_tokens(tmp_path):
    body = save_byte_model(tmp_path / "lm")
    text = write_text(tmp_path / "t.txt")
    changes = {
        "data.vocabulary_size": 300,
        "model.dropout": 0.25,
        "training.steps": 20,
        "training.learning_rate": 1e-9,
        "training.weight_decay": 0.0,
    }
    options = flags(SMALL | changes)
    preset, output = f"--preset={tmp_path / 'lm'}", tmp_path / "run"
    metrics = main([f"--config={CONFIG}", f"--file={text}", f"--output={output}", preset, *options])
    assert metrics["preset"] == str(tmp_path / "lm")
    model = PerformerCausalLM.from_preset(str(output / "preset"))
    assert (model.backbone.hidden_dim, model.backbone.dropout) == (24, 0.25)
    assert isinstance(model.preprocessor.tokenizer, ByteTokenizer)
    assert model.preprocessor.sequence_length == 48
    # Steps of no size: the body is that of the preset, not a new one.
    for a, b in zip(model.backbone.get_weights(), body.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_preset_of_short_positions_goes_on_from_texts_in_brackets(tmp_path):
    """What rich would take for markup is printed as it is."""
    positions = {"position_embedding": "learned", "max_sequence_length": 48}
    save_byte_model(tmp_path / "lm", 48, **positions)
    text = tmp_path / "t.jsonl"
    rows = [json.dumps({"text": f"[/url] item {i}: " + "and so on " * 40}) for i in range(60)]
    text.write_text("\n".join(rows), encoding="utf-8")
    short = {"training.steps": 2, "training.steps_per_epoch": 1, "training.warmup_steps": 1}
    options = flags(SMALL | short)
    preset, output = f"--preset={tmp_path / 'lm'}", tmp_path / "run"
    metrics = main([f"--config={CONFIG}", f"--file={text}", f"--output={output}", preset, *options])
    assert metrics["sample"].startswith("[/url] item")


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_byte_pairs_are_learned_from_the_training_documents_in_mixed_precision(tmp_path):
    text = write_text(tmp_path / "t.txt")
    changes = {
        "data.vocabulary_size": 280,
        "training.steps": 20,
        "training.learning_rate": 3e-2,
        "training.precision": "mixed_bfloat16",
    }
    options = flags(SMALL | changes)
    metrics = main([f"--config={CONFIG}", f"--file={text}", f"--output={tmp_path}", *options])
    model, unigram = metrics["test"]["model"], metrics["test"]["unigram"]
    num_bytes = model["cross_entropy"] * metrics["test"]["tokens"] / np.log(2)
    num_bytes /= model["bits_per_byte"]
    assert metrics["test"]["tokens"] < 0.7 * num_bytes  # pairs were merged
    assert model["bits_per_byte"] < unigram["bits_per_byte"]
    reloaded = PerformerCausalLM.from_preset(str(tmp_path / "preset"), dtype="float32")
    tokenizer = reloaded.preprocessor.tokenizer
    assert tokenizer.vocabulary_size() == 280
    for line in ("abcdefg\n", "Grüße, 東京 🧬"):
        assert tokenizer.detokenize(tokenizer.tokenize(line)) == line


def test_byte_pairs_are_the_most_frequent_ones():
    vocabulary, merges = learn_byte_pairs(["low lower lowest", "low slow"], 265)
    assert merges == ["l o", "lo w", "Ġ low", "Ġlow e"]
    assert list(vocabulary.values()) == list(range(265))
    assert list(vocabulary)[:5] == ["<pad>", "<cls>", "<eos>", "<mask>", "<unk>"]
    with pytest.raises(ValueError, match="vocabulary_size=260"):
        learn_byte_pairs(["a"], 260)


class FixedModel:
    def __init__(self, logits):
        self.logits = logits

    def predict_on_batch(self, x):
        return np.broadcast_to(self.logits, (*x["token_ids"].shape, len(self.logits)))


@pytest.mark.parametrize("source", ["text", "copyleft_text"])
def test_each_set_of_texts_is_read_as_text(source, monkeypatch):
    splits = {name: [Example(name, f"{source} {name}" * 99)] for name in SPLITS}
    monkeypatch.setitem(causal_lm.TEXTS, source, lambda: splits)
    config = load_config(Config, CONFIG, overrides(SMALL | {"data.source": source}))
    corpus = causal_lm.read_corpus(config, None, None)
    assert (corpus.kind, corpus.source) == ("text", source)
    assert corpus.test == [f"{source} test" * 99]


def test_a_tfds_set_is_read_without_labels(monkeypatch):
    splits = {name: [Example(name, f"tfds {name}" * 99)] for name in SPLITS}
    read = []
    monkeypatch.setattr(causal_lm, "load_tfds", lambda *a, **k: read.append((a, k)) or splits)
    changes = {"data.source": "tfds:wiki40b/en", "data.text_field": "body"}
    config = load_config(Config, CONFIG, overrides(SMALL | changes))
    corpus = causal_lm.read_corpus(config, None, None)
    assert read == [(("wiki40b/en", "body"), {"label_field": None})]
    assert (corpus.kind, corpus.source) == ("text", "tfds:wiki40b/en")
    assert corpus.train == ["tfds train" * 99]


def test_the_field_of_a_file_can_be_named(tmp_path):
    rows = (json.dumps({"body": f"{i} " * 99}) + "\n" for i in range(90))
    (tmp_path / "t.jsonl").write_text("".join(rows), encoding="utf-8")
    config = load_config(Config, CONFIG, overrides(SMALL | {"data.text_field": "body"}))
    corpus = causal_lm.read_corpus(config, tmp_path / "t.jsonl", None)
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 90


def test_shipped_configs_can_be_read_and_say_how_to_run_them():
    known = {}
    for path in sorted(CONFIGS.glob("*.toml")):
        text = path.read_text(encoding="utf-8")
        if f"-m training.causal_lm --config training/configs/{path.name}" in text:
            known[path.stem] = load_config(Config, path)
    text = {"text_causal_lm", "text_causal_lm_bytes", "text_causal_lm_long"}
    assert set(known) == {"protein_causal_lm", *text}
    short, long = known["text_causal_lm"], known["text_causal_lm_long"]
    assert (long.model, long.data.source) == (short.model, short.data.source)
    for config in (short, long):  # as many tokens a step
        assert config.data.sequence_length * config.training.batch_size == 8192
    long = known["text_causal_lm_bytes"]
    assert long.model.reversible and long.data.vocabulary_size == 0


def test_figures_agree_with_a_calculation_by_hand():
    parts = [np.array([0, 3, 3, 1]), np.array([0, 4, 1])]
    windows = PackedWindows(parts, 3, pad_token_id=2)
    config = load_config(Config, CONFIG, overrides(SMALL))
    logits = np.log([1e-30, 0.5, 1e-30, 0.25, 0.25]).astype("float32") + 3
    baseline = np.log([0.1, 0.2, 0.1, 0.4, 0.2])
    corpus = Corpus("text", "", [], [], ["aa", "b"])
    result = compare(FixedModel(logits), baseline, windows, config, corpus)
    assert result["tokens"] == 5 and result["sequences"] == 2
    log2 = np.log(2)
    nats = 2 * 2 * log2 + log2 + 2 * log2 + log2
    assert result["model"]["cross_entropy"] == pytest.approx(nats / 5)
    assert result["model"]["perplexity"] == pytest.approx(np.exp(nats / 5))
    assert result["model"]["bits_per_byte"] == pytest.approx(nats / log2 / 3)
    assert result["model"]["accuracy"] == pytest.approx(2 / 5)
    assert result["unigram"]["accuracy"] == pytest.approx(2 / 5)
    unigram = -np.log([0.4 * 0.4 * 0.2, 0.2 * 0.2])
    assert result["unigram"]["cross_entropy"] == pytest.approx(unigram.sum() / 5)
    differences = (unigram - log2 * np.array([5, 3])) / np.array([3, 2])
    assert result["difference"]["mean"] == pytest.approx(differences.mean())
    error = differences.std(ddof=1) / 2**0.5
    assert result["difference"]["standard_error"] == pytest.approx(error)


def test_the_unigram_counts_what_is_predicted():
    windows = PackedWindows([np.array([0, 3, 3, 1]), np.array([0, 4, 1])], 3, pad_token_id=2)
    probabilities = np.exp(unigram_log_probabilities(windows, 5))
    np.testing.assert_allclose(probabilities, np.array([0, 2, 0, 2, 1]) / 10 + 0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--file=t.txt", "--fasta=t.fasta"], "not both"),
        (["--file=nothing.txt"], r"nothing\.txt: there is no such file"),
        (["--set=data.source=books"], r"'data\.source' must be one of text, copyleft_text, sample"),
        (["--set=data.vocabulary_size=100"], r"'data\.vocabulary_size' must be 0 \(bytes\), or"),
        (["--set=data.source=sample", "--set=data.vocabulary_size=300"], "a token per residue"),
        (["--set=training.validation_windows=0"], r"'training\.validation_windows'"),
        (["--set=data.sequence_length=100000000"], "fewer than one batch"),
        (["--set=model.num_heads=3"], "num_heads=3"),
        (["--preset=nothing"], "nothing"),
        (["--preset=BYTES"], "proteins, which the preset's ByteTokenizer does not read"),
    ],
)
def test_bad_input_ends_with_one_sentence_before_any_training(
    tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr(causal_lm, "train", lambda *_: pytest.fail("training started"))
    arguments = [f"--config={CONFIG}", f"--output={tmp_path}", "--set=data.source=sample"]
    arguments.append("--set=data.vocabulary_size=0")
    (tmp_path / "metrics.json").write_text("{}", encoding="utf-8")
    if "--preset=BYTES" in options:
        save_byte_model(tmp_path / "lm")
        options = [f"--preset={tmp_path / 'lm'}"]
    with pytest.raises(SystemExit, match=message) as error:
        main([*arguments, *options])
    assert re.match("error: [^\n]*$", str(error.value))
    assert (tmp_path / "metrics.json").is_file()  # of a finished run
