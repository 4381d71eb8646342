"""The decoder model: streaming, generation with a fixed-size state, and presets."""

import itertools

import keras
import keras_hub
import numpy as np
import pytest
from gradients import call
from marks import COMPILED, slow_on_jax, slow_where_compiled
from tolerances import assert_close, relative_rms, to_numpy

from keras_performer.models import (
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    ProteinTokenizer,
)

BACKEND = keras.config.backend()
KINDS = {
    "performer": {},
    "exact_window": {"exact_window": 3, "num_sink_tokens": 2, "far_bias": -1.0},
    "relu": {"feature_map": "relu"},
    "learned": {"position_embedding": "learned", "max_sequence_length": 30},
    "softmax": {"attention": "softmax"},
    "reversible": {"reversible": True, "num_layers": 3},
    "sliding_window": {"attention": "sliding_window", "sliding_window": 5},
}
PROMPTS = ["MKTAY", "M", "MKT"]


def make_backbone(backbone_class=PerformerDecoderBackbone, **options):
    keras.utils.set_random_seed(3)
    backbone = backbone_class(
        **{
            "vocabulary_size": 30,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 12,
            "intermediate_dim": 17,
            "num_features": 16,
            "seed": 1,
            **options,
        }
    )
    # Larger than at the start of training, where every prediction is a near tie.
    embedding = backbone.token_embedding
    embedding.set_weights([30 * weight for weight in embedding.get_weights()])
    return backbone


def make_model(sampler="greedy", **options):
    preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), sequence_length=16)
    model = PerformerCausalLM(make_backbone(**options), preprocessor)
    model.compile(sampler=sampler)
    return model


def make_tokens(length, batch=2, seed=0):
    return np.random.default_rng(seed).integers(4, 30, size=(batch, length)).astype("int32")


def as_inputs(token_ids, padding_mask=None):
    padding_mask = np.ones_like(token_ids) if padding_mask is None else padding_mask
    return {"token_ids": token_ids, "padding_mask": padding_mask.astype("int32")}


def greedy_by_full_passes(model, inputs):
    """One full forward pass for every token; the longest margin between best and second best."""
    token_ids, known = inputs["token_ids"].copy(), inputs["padding_mask"].astype(bool)
    margins = []
    for place in range(known.sum(axis=1).min(), token_ids.shape[1]):
        mask = np.arange(token_ids.shape[1])[None] < np.full((len(token_ids), 1), place)
        logits = to_numpy(call(model, as_inputs(token_ids, mask)))[:, place - 1]
        best = np.sort(logits, axis=-1)
        margins.append((best[:, -1] - best[:, -2]).min())
        token_ids[:, place] = np.where(known[:, place], token_ids[:, place], logits.argmax(-1))
    return token_ids, min(margins)


# What the tests of layers hold too is left out where every new shape is compiled.
@pytest.mark.parametrize(
    "kind",
    [
        "exact_window",
        *slow_where_compiled("performer", "learned", "softmax", "reversible", "sliding_window"),
    ],
)
def test_greedy_tokens_are_those_of_full_passes(kind):
    model = make_model(tie_weights=False, **KINDS[kind])
    inputs = model.preprocessor.generate_preprocess(PROMPTS)
    inputs = {name: np.array(to_numpy(array)) for name, array in inputs.items()}
    expected, margin = greedy_by_full_passes(model, inputs)
    assert margin > 1e-4  # else rounding may decide
    preprocessor, model.preprocessor = model.preprocessor, None
    output = model.generate(dict(inputs), stop_token_ids=None)
    np.testing.assert_array_equal(output["token_ids"], expected)
    assert np.all(output["padding_mask"])
    assert len(np.unique(expected[:, 8:])) > 1
    model.preprocessor = preprocessor
    alone = model.generate("MKTAY", stop_token_ids=None)
    assert alone == preprocessor.generate_postprocess(output)[0]


@pytest.mark.parametrize(
    "sampler",
    ["top_p", "beam", *slow_where_compiled("top_k", "random", "contrastive")],
)
def test_samplers_keep_the_prompts(sampler):
    if sampler == "contrastive":
        sampler = keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.2)
    model = make_model(sampler)
    for text, prompt in zip(model.generate(PROMPTS, max_length=11), PROMPTS, strict=True):
        assert text.startswith(prompt)
        assert set(text) <= set("ACDEFGHIKLMNPQRSTVWYXBUZO<unkmas>")


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_a_beam_of_one_is_greedy_and_more_beams_are_no_worse():
    model = make_model()
    greedy = model.generate(PROMPTS, stop_token_ids=None)
    model.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=1))
    assert model.generate(PROMPTS, stop_token_ids=None) == greedy

    def log_likelihood(num_beams):
        sampler = keras_hub.samplers.BeamSampler(num_beams=num_beams)
        model.compile(sampler=sampler)
        inputs = model.preprocessor.generate_preprocess(["MKT"])
        preprocessor, model.preprocessor = model.preprocessor, None
        token_ids = model.generate(inputs, stop_token_ids=None)["token_ids"]
        model.preprocessor = preprocessor
        logits = to_numpy(call(model, as_inputs(np.array(to_numpy(token_ids)))))[0]
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(4, token_ids.shape[1])
        return logits[places - 1, to_numpy(token_ids)[0, places]].sum()

    assert log_likelihood(8) >= log_likelihood(1) - 1e-4


@pytest.mark.slow_on_jax
def test_learned_positions_end():
    model = make_model(position_embedding="learned", max_sequence_length=8)
    with pytest.raises(ValueError, match=r"for 8 tokens\. Received: a length of 9"):
        model.generate("MKT", max_length=9)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        model.call_with_state(as_inputs(make_tokens(9)), model.initial_state(2, 9))
    # Padding may lie beyond them.
    backbone, token_ids = model.backbone, make_tokens(8)
    expected = to_numpy(call(backbone, as_inputs(token_ids)))
    first = as_inputs(token_ids[:, :5])
    _, state = call(backbone.call_with_state, first, backbone.initial_state(2, 8))
    rest = np.pad(token_ids[:, 5:], ((0, 0), (0, 3)))
    mask = np.broadcast_to(np.arange(6) < 3, (2, 6))
    hidden, _ = call(backbone.call_with_state, as_inputs(rest, mask), state)
    assert_close(to_numpy(hidden)[:, :3], expected[:, 5:], "layer")


def test_a_stop_token_ends_its_row():
    model = make_model()
    inputs = model.preprocessor.generate_preprocess(PROMPTS)
    model.preprocessor = None
    free = model.generate(
        {n: np.array(to_numpy(x)) for n, x in inputs.items()}, stop_token_ids=None
    )
    stop = int(free["token_ids"][0, 9])
    first = 6 + int(np.argmax(free["token_ids"][0, 6:] == stop))
    output = model.generate(
        {n: np.array(to_numpy(x)) for n, x in inputs.items()}, stop_token_ids=[stop]
    )
    np.testing.assert_array_equal(
        output["token_ids"][0, : first + 1], free["token_ids"][0, : first + 1]
    )
    np.testing.assert_array_equal(output["padding_mask"][0], np.arange(16) <= first)


@pytest.mark.slow_on_tensorflow
def test_the_prompt_can_be_left_out():
    model = make_model()
    whole = model.generate(PROMPTS, stop_token_ids=None)
    rest = model.generate(PROMPTS, stop_token_ids=None, strip_prompt=True)
    assert [prompt + text for prompt, text in zip(PROMPTS, rest, strict=True)] == whole


@pytest.mark.parametrize(
    "kind",
    [
        *sorted(KINDS.keys() - {"relu", "learned", "reversible", "sliding_window"}),
        *slow_on_jax("relu", "learned", "reversible", "sliding_window"),
    ],
)
def test_a_stream_of_chunks_equals_one_call(kind):
    model = make_model(**KINDS[kind])
    token_ids = make_tokens(14)
    expected = to_numpy(call(model, as_inputs(token_ids)))
    state, outputs = model.initial_state(2, 14), []
    for start, stop in itertools.pairwise((0, 5, 6, 14)):
        chunk = as_inputs(token_ids[:, start:stop])
        logits, _, state = call(model.call_with_state, chunk, state)
        outputs.append(to_numpy(logits))
    assert_close(np.concatenate(outputs, axis=1), expected, "layer")


@pytest.mark.parametrize("kind", ["reversible", *slow_on_jax("performer", "exact_window")])
def test_a_stream_keeps_its_precision_under_mixed_ones(kind):
    # As much as one call does: its rounding is that of activations, and the state has none.
    length = 12
    model = PerformerCausalLM(make_backbone(dtype="mixed_bfloat16", **KINDS[kind]))
    exact = PerformerCausalLM(make_backbone(**KINDS[kind]))
    exact.set_weights(model.get_weights())
    token_ids = make_tokens(length)
    expected = to_numpy(call(exact, as_inputs(token_ids)))
    whole = relative_rms(call(model, as_inputs(token_ids)), expected)
    state, outputs = model.initial_state(2, length), []
    for t in range(length):
        logits, _, state = call(model.call_with_state, as_inputs(token_ids[:, t : t + 1]), state)
        outputs.append(to_numpy(logits))
    assert 0 < relative_rms(np.concatenate(outputs, axis=1), expected) < 1.5 * whole


@pytest.mark.parametrize("kind", ["performer", "exact_window", "learned", "softmax"])
def test_rows_of_different_length_go_on_after_their_last_token(kind):
    backbone = make_backbone(**KINDS[kind])
    token_ids = make_tokens(9)
    first, lengths = np.full((2, 5), 0, "int32"), (3, 5)
    mask = np.arange(5) < np.array(lengths)[:, None]
    for row, length in enumerate(lengths):
        first[row, :length] = token_ids[row, :length]
    rest = np.stack([token_ids[row, n : n + 4] for row, n in enumerate(lengths)])
    _, state = call(backbone.call_with_state, as_inputs(first, mask), backbone.initial_state(2, 14))
    np.testing.assert_array_equal(to_numpy(state[0]["position"]), lengths)
    hidden, _ = call(backbone.call_with_state, as_inputs(rest), state)
    for row, length in enumerate(lengths):
        alone = to_numpy(call(backbone, as_inputs(token_ids[row : row + 1, : length + 4])))
        assert_close(to_numpy(hidden)[row], alone[0, length:], "layer")


@pytest.mark.parametrize("kind", ["performer", "softmax"])
def test_an_encoder_streams_block_by_block(kind):
    """A chunk sees itself and the chunks before it: a full pass over those is the oracle."""
    backbone = make_backbone(PerformerEncoderBackbone, num_layers=1, **KINDS[kind])
    token_ids = make_tokens(12)
    state = backbone.initial_state(2, 12)
    for start, stop in itertools.pairwise((0, 4, 5, 12)):
        chunk = as_inputs(token_ids[:, start:stop])
        hidden, state = call(backbone.call_with_state, chunk, state)
        whole = to_numpy(call(backbone, as_inputs(token_ids[:, :stop])))
        assert_close(hidden, whole[:, start:], "layer")


@pytest.mark.slow_on_jax
def test_several_encoder_layers_stream_as_a_block_causal_mask():
    """With softmax attention the mask can be written down: Keras's own layers are the oracle."""
    backbone = make_backbone(PerformerEncoderBackbone, attention="softmax", qk_norm=False,
                             position_embedding="learned", max_sequence_length=12)  # fmt: skip
    token_ids, bounds = make_tokens(12), (0, 4, 5, 12)
    block = np.searchsorted(bounds[1:], np.arange(12), side="right")
    mask = block[None, :, None] >= block[None, None, :]
    x = backbone.embeddings_add(
        (
            backbone.token_embedding(token_ids),
            backbone.position_embedding_layer(backbone.token_embedding(token_ids)),
        )
    )
    for layer in backbone.transformer_layers:
        attention = keras.layers.MultiHeadAttention(2, 6)
        attention.build(x.shape, x.shape)
        attention.set_weights(layer.self_attention.get_weights())
        y = layer.self_attention_norm(x)
        x = x + attention(y, y, attention_mask=mask)
        y = layer.feedforward_intermediate(layer.feedforward_norm(x))
        x = x + layer.feedforward_output(y)
    expected = to_numpy(backbone.final_norm(x))
    state, outputs = backbone.initial_state(2, 12), []
    for start, stop in itertools.pairwise(bounds):
        hidden, state = backbone.call_with_state(as_inputs(token_ids[:, start:stop]), state)
        outputs.append(to_numpy(hidden))
    assert_close(np.concatenate(outputs, axis=1), expected, "layer")


def test_the_future_does_not_matter():
    model = make_model()
    token_ids = make_tokens(12)
    before = to_numpy(call(model, as_inputs(token_ids)))
    token_ids[:, 7:] = make_tokens(5, seed=9)
    after = to_numpy(call(model, as_inputs(token_ids)))
    assert_close(after[:, :7], before[:, :7], "layer")
    assert np.abs(after - before)[:, 7:].max() > 0.1


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_learns_from_strings():
    model = make_model()
    model.compile("adam", sampler="greedy")
    model.optimizer.learning_rate = 1e-2
    data = ["MKMKMKMKMKMKMK", "KMKMKMKMKMKMKM"] * 4
    before = model.evaluate(data, batch_size=4, verbose=0)[0]
    model.fit(data, batch_size=4, epochs=12, verbose=0)
    assert model.evaluate(data, batch_size=4, verbose=0)[0] < before - 1
    assert "MKMKMK" in model.generate("MKMKMK", max_length=14)


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_a_preset_comes_back_also_through_the_base_classes(tmp_path):
    model = make_model()
    inputs = as_inputs(make_tokens(7))
    expected = to_numpy(model(inputs))
    texts = model.generate(PROMPTS, stop_token_ids=None)
    model.save_to_preset(str(tmp_path))
    for loaded in (
        PerformerCausalLM.from_preset(str(tmp_path)),
        keras_hub.models.CausalLM.from_preset(str(tmp_path)),
    ):
        assert isinstance(loaded, PerformerCausalLM)
        np.testing.assert_array_equal(to_numpy(loaded(inputs)), expected)
        loaded.compile(sampler="greedy")
        assert loaded.generate(PROMPTS, stop_token_ids=None) == texts
    backbone = keras_hub.models.Backbone.from_preset(str(tmp_path))
    assert isinstance(backbone, PerformerDecoderBackbone)


def test_untied_weights_and_every_option_come_back(tmp_path):
    backbone = make_backbone(
        tie_weights=False, attention="sliding_window", sliding_window=3, remat=True, gated=True
    )
    model = PerformerCausalLM(backbone)
    inputs = as_inputs(make_tokens(7))
    expected = to_numpy(model(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(inputs)), expected)
    assert loaded.backbone.get_config() == backbone.get_config()
    names = [weight.path for weight in backbone.token_embedding.weights]
    assert len(names) == 2 and "reverse" in names[1]


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
@pytest.mark.parametrize(
    ("options", "length", "eagerly"),
    [
        pytest.param({}, 9, False, marks=pytest.mark.slow_on_jax),
        pytest.param({"dropout": 0.2}, 9, False, marks=pytest.mark.slow_on_jax),
        ({}, 9, True),
        ({}, 300, False),
        pytest.param({"exact_window": 16}, 700, False, marks=COMPILED),
    ],
)
def test_recomputed_blocks_have_the_same_gradients(options, length, eagerly):
    """One step of plain SGD moves every weight the same way with and without `remat`.

    The long ones have several chunks, whose own recomputation runs within that of the block.
    """
    changes = []
    for remat in (False, True):
        model = make_model(remat=remat, **options)
        model.compile(keras.optimizers.SGD(1.0), sampler="greedy", run_eagerly=eagerly)
        before = model.get_weights()
        model.preprocessor = None
        model.train_on_batch(as_inputs(make_tokens(length)), make_tokens(length, seed=4))
        changes.append([b - a for a, b in zip(before, model.get_weights(), strict=True)])
    for kept, recomputed in zip(*changes, strict=True):
        np.testing.assert_allclose(recomputed, kept, rtol=1e-4, atol=1e-5)
    assert max(np.abs(change).max() for change in changes[0]) > 1e-2


def test_prompts_begin_as_strings_do_in_training():
    preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), 5, add_start_token=False)
    trained = to_numpy(preprocessor(["MKTAY"])[0]["token_ids"])
    prompt = preprocessor.generate_preprocess(["MKTAY"])
    np.testing.assert_array_equal(to_numpy(prompt["token_ids"]), trained)
    preprocessor.sequence_length = 4
    assert to_numpy(preprocessor.generate_preprocess("MK")["padding_mask"]).tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match=r"needs a token to go on from.*\[1, 0\] tokens"):
        preprocessor.generate_preprocess(["M", ""])
