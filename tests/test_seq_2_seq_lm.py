"""The encoder-decoder model: padding, decoding with a state, generation, presets."""

import itertools

import keras
import keras_hub
import numpy as np
import pytest
from gradients import call
from marks import slow_where_compiled
from test_causal_lm import KINDS, make_backbone, make_tokens
from tolerances import assert_close, to_numpy

from keras_performer.models import (
    PerformerSeq2SeqBackbone,
    PerformerSeq2SeqLM,
    PerformerSeq2SeqLMPreprocessor,
    ProteinTokenizer,
)


def make_model(sampler="greedy", **options):
    preprocessor = PerformerSeq2SeqLMPreprocessor(
        ProteinTokenizer(), encoder_sequence_length=9, decoder_sequence_length=12
    )
    backbone = make_backbone(PerformerSeq2SeqBackbone, **options)
    model = PerformerSeq2SeqLM(backbone, preprocessor)
    model.compile(sampler=sampler)
    return model


def make_inputs(source_length=7, target_length=11):
    source, target = make_tokens(source_length), make_tokens(target_length, seed=5)
    mask = np.ones_like(source)
    mask[0, 4:] = 0
    return {
        "encoder_token_ids": source,
        "encoder_padding_mask": mask,
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones_like(target),
    }


@pytest.mark.parametrize("kind", ["performer", "sliding_window", "reversible"])
def test_padding_of_the_source_does_not_matter(kind):
    model = make_model(**KINDS[kind])
    inputs = make_inputs()
    output = to_numpy(call(model, inputs))
    assert output.shape == (2, 11, 30)
    alone = {name: array[:1] for name, array in inputs.items()}
    for name in ("encoder_token_ids", "encoder_padding_mask"):
        alone[name] = alone[name][:, :4]
    assert_close(output[:1], call(model, alone), "layer")
    inputs["encoder_token_ids"][0, 2] += 1
    assert np.abs(to_numpy(call(model, inputs)) - output)[0].max() > 1e-3


def test_the_future_of_the_target_does_not_matter():
    model = make_model()
    inputs = make_inputs()
    before = to_numpy(call(model, inputs))
    inputs["decoder_token_ids"][:, 6:] = make_tokens(5, seed=8)
    after = to_numpy(call(model, inputs))
    assert_close(after[:, :6], before[:, :6], "layer")
    assert np.abs(after - before)[:, 6:].max() > 0.1


@pytest.mark.parametrize("kind", ["performer", "sliding_window", "reversible"])
def test_decoding_with_a_state_equals_one_call(kind):
    backbone = make_backbone(PerformerSeq2SeqBackbone, **KINDS[kind])
    inputs = make_inputs()
    expected = call(backbone, inputs)
    encoded = call(backbone.encode, inputs["encoder_token_ids"], inputs["encoder_padding_mask"])
    assert_close(encoded, expected["encoder_sequence_output"], "layer")
    state = backbone.initial_state(encoded, inputs["encoder_padding_mask"], 11)
    outputs = []
    for start, stop in itertools.pairwise((0, 4, 5, 11)):
        part = {
            name: inputs[name][:, start:stop]
            for name in ("decoder_token_ids", "decoder_padding_mask")
        }
        hidden, state = call(backbone.call_with_state, part, state)
        outputs.append(to_numpy(hidden))
    assert_close(np.concatenate(outputs, axis=1), expected["decoder_sequence_output"], "layer")


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("kind", ["performer", *slow_where_compiled("softmax")])
def test_greedy_tokens_are_those_of_full_passes(kind):
    model = make_model(tie_weights=False, **KINDS[kind])
    prompts = {"encoder_text": ["MKTAYI", "MK", "AWLL"], "decoder_text": ["M", "MKT", ""]}
    inputs = model.preprocessor.generate_preprocess(prompts)
    inputs = {name: np.array(to_numpy(array)) for name, array in inputs.items()}
    inputs = {name: array.astype("int32") for name, array in inputs.items()}
    expected = {name: array.copy() for name, array in inputs.items()}
    known, margins = inputs["decoder_padding_mask"].astype(bool), []
    tokens = expected["decoder_token_ids"]
    for place in range(known.sum(axis=1).min(), tokens.shape[1]):
        expected["decoder_padding_mask"][:] = np.arange(tokens.shape[1]) < place
        logits = to_numpy(call(model, expected))[:, place - 1]
        best = np.sort(logits, axis=-1)
        margins.append((best[:, -1] - best[:, -2]).min())
        tokens[:, place] = np.where(known[:, place], tokens[:, place], logits.argmax(-1))
    assert min(margins) > 1e-4  # else rounding may decide
    preprocessor, model.preprocessor = model.preprocessor, None
    output = model.generate(dict(inputs), stop_token_ids=None)
    np.testing.assert_array_equal(output["decoder_token_ids"], tokens)
    model.preprocessor = preprocessor
    assert model.generate(prompts, stop_token_ids=None) == preprocessor.generate_postprocess(output)


@pytest.mark.parametrize("sampler", ["top_k", "beam"])
def test_strings_in_strings_out(sampler):
    model = make_model(sampler)
    texts = model.generate(["MKTAY", "M"])
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
    prompts = {"encoder_text": ["MKTAY", "M"], "decoder_text": ["AC", "Y"]}
    for text, prompt in zip(model.generate(prompts), prompts["decoder_text"], strict=True):
        assert text.startswith(prompt)


def test_targets_come_without_their_prompts():
    model = make_model()
    sources, prompts = ["MKTAY", "M"], ["ACD", "Y"]
    inputs = {"encoder_text": sources, "decoder_text": prompts}
    whole = model.generate(inputs, stop_token_ids=None)
    rest = model.generate(inputs, stop_token_ids=None, strip_prompt=True)
    assert [prompt + text for prompt, text in zip(prompts, rest, strict=True)] == whole
    assert model.generate(inputs, stop_token_ids=None) == whole
    assert model.generate({"encoder_text": sources}) == model.generate(sources)
    one = {"encoder_text": "MKT", "decoder_text": "A"}
    assert isinstance(model.generate(one), str) and one["encoder_text"] == "MKT"
    with pytest.raises(ValueError, match="2 of encoder_text, 1 of decoder_text"):
        model.generate({"encoder_text": sources, "decoder_text": "A"})
    numbers = model.preprocessor.generate_preprocess(inputs)
    model.preprocessor = None
    stripped = model.generate(numbers, stop_token_ids=None, strip_prompt=True)
    mask = to_numpy(stripped["decoder_padding_mask"])
    np.testing.assert_array_equal(mask.sum(axis=1), [8, 10])  # of 12, less start and prompt
    assert not np.any(np.diff(mask.astype(int), axis=1) > 0)


@pytest.mark.slow
def test_learns_to_copy_from_strings():
    model = make_model(num_layers=1)
    model.compile("adam", sampler="greedy")
    model.optimizer.learning_rate = 1e-2
    texts = ["MMMM", "KKKK", "AAAA", "CCCC"] * 4
    data = {"encoder_text": texts, "decoder_text": texts}
    before = model.evaluate(data, batch_size=8, verbose=0)[0]
    model.fit(data, batch_size=8, epochs=40, verbose=0)
    assert model.evaluate(data, batch_size=8, verbose=0)[0] < before / 4
    assert model.generate(["KKKK", "CCCC"]) == ["KKKK", "CCCC"]


@pytest.mark.slow
def test_a_preset_comes_back(tmp_path):
    model = make_model()
    inputs = make_inputs()
    expected = to_numpy(model(inputs))
    texts = model.generate(["MKTAY", "M"], stop_token_ids=None)
    model.save_to_preset(str(tmp_path))
    for loaded in (
        PerformerSeq2SeqLM.from_preset(str(tmp_path)),
        keras_hub.models.Seq2SeqLM.from_preset(str(tmp_path)),
    ):
        np.testing.assert_array_equal(to_numpy(loaded(inputs)), expected)
        loaded.compile(sampler="greedy")
        assert loaded.generate(["MKTAY", "M"], stop_token_ids=None) == texts


@pytest.mark.slow_on_jax
def test_a_saved_model_comes_back_with_its_sampler(tmp_path):
    model = make_model(keras_hub.samplers.TopKSampler(k=3, seed=1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.sampler.get_config() == model.sampler.get_config()
    inputs = make_inputs()
    np.testing.assert_array_equal(to_numpy(loaded(inputs)), to_numpy(model(inputs)))


def test_both_sides_have_their_own_random_features():
    backbone = make_backbone(PerformerSeq2SeqBackbone)
    drawn = [to_numpy(w) for w in backbone.weights if w.path.endswith("projection")]
    assert len(drawn) == 6
    # Self- and cross-attention of one block differ in their queries, so they may share a draw.
    assert len({array.tobytes() for array in drawn}) >= 4
