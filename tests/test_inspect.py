import json
import re

import keras
import numpy as np
import pytest
from keras import ops
from marks import slow_where_compiled
from tolerances import assert_close

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from keras_performer.layers._recording import record_calls
from keras_performer.models import (
    ByteTokenizer,
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerSequenceClassifier,
    PerformerTokenClassifier,
    PerformerTokenClassifierPreprocessor,
    ProteinTokenizer,
)
from training import inspect
from training.data.protein_sample import load_protein_sample
from training.scores import log_probabilities

SHAPE = {
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 16,
    "num_features": 8,
    "seed": 3,
}
LENGTH = 23
ROW = np.random.default_rng(0).integers(5, 25, LENGTH).astype("int32")


def save_classifier(folder):
    tokenizer = ProteinTokenizer()
    backbone = PerformerEncoderBackbone(tokenizer.vocabulary_size(), exact_window=4, **SHAPE)
    preprocessor = PerformerTokenClassifierPreprocessor(tokenizer, sequence_length=32)
    PerformerTokenClassifier(backbone, 3, preprocessor).save_to_preset(str(folder))
    (folder / "classes.json").write_text('["H", "E", "C"]', encoding="utf-8")


def save_language_model(folder):
    tokenizer = ByteTokenizer()
    backbone = PerformerDecoderBackbone(
        tokenizer.vocabulary_size(), attention="sliding_window", sliding_window=4, **SHAPE
    )
    preprocessor = PerformerCausalLMPreprocessor(tokenizer, sequence_length=32)
    PerformerCausalLM(backbone, preprocessor).save_to_preset(str(folder))


@pytest.mark.parametrize(
    "backbone_class, options",
    [
        pytest.param(
            PerformerEncoderBackbone,
            {"exact_window": 4, "num_heads": 4, "num_key_value_heads": 2},
            marks=pytest.mark.slow_on_jax,
        ),
        pytest.param(
            PerformerDecoderBackbone,
            {"exact_window": 4, "num_sink_tokens": 1},
            marks=pytest.mark.slow_on_jax,
        ),
        (PerformerDecoderBackbone, {"attention": "sliding_window", "sliding_window": 4}),
    ],
)
def test_maps_are_the_weights_that_the_layer_applies_and_those_of_softmax(backbone_class, options):
    model = type("Model", (), {"backbone": backbone_class(30, **{**SHAPE, **options})})
    with record_calls() as calls:
        records = inspect.record_layers(model, ROW)
    assert len(records) == len(calls) == 1
    record, call = records[0], calls[0]
    heads, head_dim = call.layer.num_heads, call.layer.key_dim
    exact, own = inspect.attention_maps(record, num_blocks=LENGTH)
    assert exact.shape == own.shape == (heads, LENGTH, LENGTH)
    assert_close(own.sum(-1), np.ones((heads, LENGTH)))

    values = ops.convert_to_numpy(call.layer.value_dense(call.arguments["value"]))[0]
    values = values.repeat(heads // values.shape[1], axis=1)
    attended = np.einsum("nts,snv->tnv", own, values).astype("float32")
    output = call.layer.output_dense(ops.convert_to_tensor(attended[None]))
    assert_close(output, call.output)

    query, key = (ops.convert_to_numpy(x)[0] for x in (record.query, record.key))
    key = key.repeat(heads // key.shape[1], axis=1)
    scores = np.einsum("tnh,snh->nts", query, key).astype("float64") / head_dim**0.5
    if backbone_class is PerformerDecoderBackbone:
        scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    weights = np.exp(scores)
    assert_close(exact, weights / weights.sum(-1, keepdims=True))
    assert np.abs(own - exact).max() > 0.01

    # 23 tokens in at most five blocks: four of five tokens, and one of three.
    coarse = inspect.attention_maps(record, num_blocks=5)
    edges = [0, 5, 10, 15, 20]
    for blocks, fine in zip(coarse, (exact, own), strict=True):
        sums = np.add.reduceat(fine, edges, axis=2)
        means = np.add.reduceat(sums, edges, axis=1) / np.array([5, 5, 5, 5, 3])[:, None]
        assert_close(blocks, means)


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("groups", [3, *slow_where_compiled(0)])
def test_every_token_is_predicted_while_it_is_masked(groups):
    model = PerformerMaskedLM.from_preset("performer_tiny")
    row = ROW[:13]
    trainer = keras.Model(model.input, model.output)
    logits = inspect.masked_logits(trainer, row, mask_id=4, groups=groups)
    assert logits.shape == (11, 30)
    for place in range(1, 12):
        masked = row.copy()
        masked[place : 12 : groups or 11] = 4
        masked[place : 0 : -(groups or 11)] = 4
        x = {
            **inspect.inputs_of(masked[None]),
            "mask_positions": np.array([[place]], "int32"),
        }
        expected = ops.convert_to_numpy(model(x, training=False))[0, 0]
        np.testing.assert_allclose(logits[place - 1], expected, rtol=1e-4, atol=1e-5)


def test_probabilities_and_their_entropy():
    logits = np.log(np.array([[1, 1, 2], [1, 1e-9, 1e-9]]))
    found = inspect.Predictions(
        "x", np.exp(log_probabilities(logits)), ["a", "b", "c"], np.array([2, 0])
    )
    np.testing.assert_allclose(found.of_truth, [0.5, 1], atol=1e-6)
    np.testing.assert_allclose(found.entropy, [1.5, 0], atol=1e-6)


def test_predictions_of_which_none_stands_out_are_drawn():
    flat = np.full((3, 5000), 1 / 5000)
    found = inspect.Predictions("x", flat, [str(i) for i in range(5000)], np.array([2, 0, 1]))
    assert inspect.draw_predictions(found, "flat").axes[0].get_yticks().size == inspect.SHOWN_TOKENS


def pictures(folder):
    assert all(path.stat().st_size > 5_000 for path in folder.glob("*.png"))
    return {path.stem for path in folder.glob("*.png")}


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_masked_language_model_is_drawn(tmp_path):
    flags = ["--lengths", "32", "--length", "32", "--groups", "2"]
    results = inspect.main(["performer_tiny", f"--output={tmp_path}", *flags])
    assert json.loads((tmp_path / "inspection.json").read_text(encoding="utf-8")) == results
    names = {"attention_1", "attention_2", "health", "predictions_1", "predictions_2", "cost"}
    assert pictures(tmp_path) == names
    _, heldout = load_protein_sample()
    first, second = results["sequences"]
    assert first["name"] == f"1. {heldout[0].name}" and second["tokens"] == 32
    # It knows the residues' frequencies, and little more.
    assert 5 < first["perplexity"] < 40 and 3 < first["mean_entropy"] < 4.4
    assert [len(layer["effective_features"]) for layer in results["health"]] == [2, 2]
    assert min(results["health"][0]["effective_features"]) > 0
    assert set(results["cost"]["seconds"]) == {"performer", "softmax"}


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_token_classifier_is_drawn(tmp_path):
    save_classifier(tmp_path / "preset")
    (tmp_path / "p.fasta").write_text(">P1\nMKTAYIAKQRQISF\n", encoding="utf-8")
    output = tmp_path / "pictures"
    results = inspect.main(
        [
            str(tmp_path / "preset"),
            f"--fasta={tmp_path / 'p.fasta'}",
            f"--output={output}",
            "--lengths=16",
        ]
    )
    assert pictures(output) == {"attention_1", "health", "predictions_1", "cost"}
    assert results["task"] == "PerformerTokenClassifier"
    (sequence,) = results["sequences"]
    assert sequence["tokens"] == 16 and 0 < sequence["mean_entropy"] <= np.log2(3)

    model, states = inspect.load_model(str(tmp_path / "preset"), None)
    row = inspect.token_row("MKTAYIAKQRQISF", model, 512)
    found = inspect.predict(model, row, states, groups=8)
    assert found is not None and found.names == ["H", "E", "C"] and found.truth is None
    logits = model.predict(["MKTAYIAKQRQISF"], verbose=0)[0, 1:15]
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-4)


@pytest.mark.slow_on_jax
def test_a_causal_language_model_is_drawn(tmp_path):
    save_language_model(tmp_path / "preset")
    (tmp_path / "t.txt").write_text("In the beginning", encoding="utf-8")
    output = tmp_path / "pictures"
    results = inspect.main(
        [
            str(tmp_path / "preset"),
            f"--text={tmp_path / 't.txt'}",
            f"--output={output}",
            "--lengths=18",
        ]
    )
    # Exact attention has no features whose health could be drawn.
    assert pictures(output) == {"attention_1", "predictions_1", "cost"}
    model, _ = inspect.load_model(str(tmp_path / "preset"), None)
    row = inspect.token_row("In the beginning", model, 512)
    logits = ops.convert_to_numpy(model(inspect.inputs_of(row[None]), training=False))[0]
    logits = logits.astype("float64")
    normalizer = np.log(np.exp(logits).sum(-1))
    surprise = [normalizer[t - 1] - logits[t - 1, row[t]] for t in range(1, 17)]
    assert len(row) == 18
    assert results["sequences"][0]["perplexity"] == pytest.approx(np.exp(np.mean(surprise)), 1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["performer_large"], "no preset called 'performer_large'"),
        (["performer_tiny", "--count=0"], "--count must be at least 1"),
        (["performer_tiny", "--lengths", "0"], "--lengths must be at least 1"),
        (["performer_tiny", "--text=t.txt"], "This model reads proteins: pass --fasta"),
        (["performer_tiny", "--fasta=nothing.fasta"], "nothing.fasta: there is no such file"),
        (["{language_model}"], "This model does not read proteins: pass --text"),
        (["{language_model}", "--text=nothing.txt"], "nothing.txt: there is no such file"),
        (["{backbone}"], r"holds no task \(task.json\)"),
        (["{list_ops}"], "The preset has no tokenizer"),
    ],
)
def test_bad_arguments_end_with_one_sentence(tmp_path, flags, message):
    folder = tmp_path / "preset"
    if flags[0] == "{language_model}":
        save_language_model(folder)
    elif flags[0].startswith("{"):
        backbone = PerformerEncoderBackbone(30, **SHAPE)
        model = PerformerSequenceClassifier(backbone, 2) if "list" in flags[0] else backbone
        model.save_to_preset(str(folder))
    if flags[0].startswith("{"):
        flags = [str(folder), *flags[1:]]
    with pytest.raises(SystemExit, match=message) as error:
        inspect.main([*flags, f"--output={tmp_path / 'pictures'}"])
    assert re.match("error: [^\n]*$", str(error.value))
    assert not (tmp_path / "pictures").exists()
