import itertools

import keras
import numpy as np
import pytest
from gradients import call, gradients, value_of
from marks import slow_on_jax
from test_encoder_block import NON_DEFAULT, inputs
from tolerances import assert_close, to_numpy

from keras_performer.layers import PerformerDecoderBlock, PerformerEncoderBlock

KINDS = {
    "performer": {},
    "exact_window": {"exact_window": 2, "num_sink_tokens": 1, "far_bias": -1.0},
    "softmax": {"attention": "softmax"},
    "sliding_window": {"attention": "sliding_window", "sliding_window": 4},
}
# What the tests of the op and the layer hold too is left out on JAX.
FEWER_ON_JAX = ["exact_window", "sliding_window", *slow_on_jax("performer", "softmax")]


def make_block(block_class=PerformerDecoderBlock, **options):
    return block_class(
        **{
            "num_heads": 3,
            "intermediate_dim": 13,
            "key_dim": 4,
            "num_features": 17,
            "seed": 1,
            **options,
        }
    )


@pytest.mark.parametrize("kind", FEWER_ON_JAX)
@pytest.mark.parametrize("place", [*slow_on_jax(0, 6), 3])
def test_the_future_does_not_matter(kind, place):
    block = make_block(**KINDS[kind])
    x = inputs()
    before = to_numpy(call(block, x))
    x[:, place + 1 :] = 3 * x[:, place + 1 :, ::-1]
    after = to_numpy(call(block, x))
    assert_close(after[:, : place + 1], before[:, : place + 1], "layer")
    if place < 6:
        assert np.abs(after[:, place + 1 :] - before[:, place + 1 :]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_those_before(kind):
    block = make_block(**KINDS[kind])
    x = inputs()
    before = to_numpy(call(block, x))
    x[:, 2] = x[:, 2, ::-1]
    assert np.abs(to_numpy(call(block, x)) - before)[:, 3:5].max() > 1e-3


@pytest.mark.parametrize("kind", FEWER_ON_JAX)
@pytest.mark.parametrize("crosses", [*slow_on_jax(False), True])
def test_token_by_token_equals_one_call(kind, crosses):
    block = make_block(cross_attention=crosses, **KINDS[kind])
    x, encoded = inputs(length=9), inputs(length=5, width=6, seed=4)
    encoder_mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    extra, memory = {}, {}
    if crosses:
        extra = {"encoder_outputs": encoded, "encoder_padding_mask": encoder_mask}
    expected = call(block, x, **extra)
    if crosses:
        memory = {"encoder_outputs": block.encoder_memory(encoded, encoder_mask)}
    state, outputs = block.initial_state(2, 9), []
    for start, stop in itertools.pairwise((0, 3, *range(4, 10))):
        output, state = call(
            block, x[:, start:stop], initial_state=state, return_state=True, **memory
        )
        outputs.append(to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), expected, "layer")


def test_padding_of_the_encoder_does_not_matter():
    block = make_block(cross_attention=True)
    x, encoded = inputs(), inputs(length=5, width=6, seed=4)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    encoded[0, 3:] = 1e3
    output = to_numpy(call(block, x, encoded, encoder_padding_mask=mask))
    assert_close(output[:1], call(block, x[:1], encoded[:1, :3]), "layer")
    assert np.abs(output - to_numpy(call(block, x, encoded)))[0].max() > 1e-3


def test_left_padding_does_not_matter():
    block = make_block()
    x = inputs()
    mask = np.ones((2, 7), bool)
    mask[0, :3] = False
    output = to_numpy(call(block, x, padding_mask=mask))
    assert_close(output[:1, 3:], call(block, x[:1, 3:]), "layer")


def test_functional_model_with_an_encoder_saves_and_loads(tmp_path):
    source, target = keras.Input((None, 6)), keras.Input((None, 11))
    encoded = make_block(PerformerEncoderBlock, key_dim=2)(source)
    decoded = make_block(cross_attention=True)(target, encoded)
    model = keras.Model([source, target], decoded)
    assert model.output_shape == (None, None, 11)
    data = [inputs(length=5, width=6, seed=4), inputs()]
    expected = model.predict(data, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(data, verbose=0), expected)


def test_config_comes_back():
    block = PerformerDecoderBlock(**NON_DEFAULT, cross_attention=True)
    config = PerformerDecoderBlock.from_config(block.get_config()).get_config()
    assert config == block.get_config()
    for name in set(NON_DEFAULT) - {"kernel_initializer"}:
        assert config[name] == NON_DEFAULT[name]
    assert config["cross_attention"] is True


@pytest.mark.parametrize("block_class", [PerformerDecoderBlock, PerformerEncoderBlock])
@pytest.mark.parametrize("kind", ["softmax", "sliding_window"])
def test_baselines_share_every_other_weight(block_class, kind):
    def names(**options):
        block = make_block(block_class, **options)
        block.build((None, None, 12))
        return [(w.path.split("/", 1)[1], tuple(w.shape)) for w in block.weights]

    performer = names()
    assert names(**KINDS[kind]) == [
        (name, shape) for name, shape in performer if "feature_map" not in name
    ]
    assert len(names(**KINDS[kind])) == len(performer) - 1


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(precision):
    block = make_block(dtype=precision, cross_attention=True)
    x, encoded = inputs(), inputs(length=5, width=6, seed=4)
    output = block(x, encoded)
    assert keras.backend.standardize_dtype(output.dtype) == precision.removeprefix("mixed_")
    full = make_block(cross_attention=True)
    full.build(x.shape, encoded.shape)
    full.set_weights(block.get_weights())
    assert_close(output, full(x, encoded), precision.removeprefix("mixed_"))


def test_bad_input_is_explained():
    x = inputs()
    with pytest.raises(ValueError, match="cross_attention=False, encoder_outputs given"):
        make_block()(x, x)
    with pytest.raises(ValueError, match="cross_attention=True, encoder_outputs missing"):
        make_block(cross_attention=True)(x)
    with pytest.raises(
        ValueError, match=r"`attention` must be one of .*Received: attention='fast'"
    ):
        make_block(attention="fast")
    with pytest.raises(ValueError, match="needs one"):
        make_block(attention="sliding_window")
    with pytest.raises(ValueError, match="of no other"):
        make_block(sliding_window=4)


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_reach_the_state_and_the_memory(remat):
    """By difference quotients: of a stream's second chunk by the first, and by the encoder's."""
    block = make_block(remat=remat, cross_attention=True, dtype="float32")
    x, encoded = inputs(length=6), inputs(length=5, width=6, seed=4)
    block(x, encoded)

    def second(first, encoded):
        memory = block.encoder_memory(encoded)
        _, state = block(first, memory, return_state=True, training=True)
        output = block(x[:, ::-1], memory, initial_state=state, training=True)
        return keras.ops.sum(output[..., :3] ** 2)

    _, found = gradients(second, x, encoded)
    for place, gradient in enumerate(found):
        step = [np.zeros_like(x), np.zeros_like(encoded)]
        step[place] = (1e-2 / np.abs(gradient).max() * gradient).astype("float32")
        up = value_of(second, x + step[0], encoded + step[1])
        down = value_of(second, x - step[0], encoded - step[1])
        expected = 2 * (gradient * step[place]).sum()
        np.testing.assert_allclose(up - down, expected, rtol=2e-2)
        assert np.abs(gradient).max() > 1e-2


@pytest.mark.slow_on_jax
def test_a_functional_model_returns_the_state_of_segments_by_name():
    ids = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]], "int32")
    x = inputs(length=6)[:2]
    block = make_block(**KINDS["exact_window"])
    tokens, segments = keras.Input(x.shape[1:]), keras.Input((6,), dtype="int32")
    outputs = block(tokens, segment_ids=segments, return_state=True)
    output, state = keras.Model([tokens, segments], outputs)([x, ids])
    expected, expected_state = block(x, segment_ids=ids, return_state=True)
    assert_close(output, expected, "layer")
    assert set(state) == set(expected_state) >= {"segment_id", "window_key"}
    for name, tensor in expected_state.items():
        assert_close(state[name], tensor, "layer")


@pytest.mark.slow_on_jax
def test_a_memory_knows_the_keras_mask():
    block = make_block(cross_attention=True)
    embedding = keras.layers.Embedding(10, 6, mask_zero=True)
    x = inputs(length=4)[:2]
    encoded = embedding(np.array([[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]]))
    expected = block(x, encoded)
    assert_close(block(x, block.encoder_memory(encoded)), expected, "layer")
