"""Reversible stacks: gradients against plain differentiation, and streams."""

import itertools

import keras
import numpy as np
import pytest
from gradients import call
from keras import ops
from marks import slow_where_compiled
from test_encoder_block import inputs
from tolerances import assert_close, assert_gradients_close, relative_rms, to_numpy

from keras_performer.layers import (
    PerformerDecoderBlock,
    PerformerEncoderBlock,
    ReversibleStack,
)

BACKEND = keras.config.backend()


class TwoStreams(keras.layers.Layer):
    """The same function written plainly, for the backend to differentiate."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = list(blocks)

    def build(self, inputs_shape, encoder_outputs_shape=None):
        for block in self.blocks:
            block.build(*(s for s in (inputs_shape, encoder_outputs_shape) if s is not None))

    def call(self, inputs, encoder_outputs=None, padding_mask=None, training=None):
        mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
        first = second = inputs
        for block in self.blocks:
            first = first + block.attend(second, key_mask=mask, training=training)[0]
            if encoder_outputs is None:
                second = second + block.feed_forward(first, training)
            else:
                second = second + block.attend_encoder(first, encoder_outputs, None, training)
                first = first + block.feed_forward(second, training)
                first, second = second, first
        return (first + second) / 2


def make_blocks(kind, count=3, **options):
    block_class = PerformerEncoderBlock if kind == "encoder" else PerformerDecoderBlock
    options = {"key_dim": 4, "num_features": 16, **options}
    if kind == "crossing":
        options["cross_attention"] = True
    return [block_class(num_heads=2, intermediate_dim=9, seed=i, **options) for i in range(count)]


def trained(layer, x, encoded, mask, steps=1):
    """The weights after steps of plain gradient descent: their changes are the gradients."""
    symbols = [keras.Input(x.shape[1:]), keras.Input(mask.shape[1:], dtype="bool")]
    arrays = [x, mask]
    if encoded is not None:
        symbols.append(keras.Input(encoded.shape[1:]))
        arrays.append(encoded)
        # So that the gradient by the encoder's outputs counts too.
        scaled = keras.layers.Dense(encoded.shape[-1], kernel_initializer="identity")(symbols[2])
        output = layer(symbols[0], scaled, padding_mask=symbols[1])
    else:
        output = layer(symbols[0], padding_mask=symbols[1])
    model = keras.Model(symbols, output)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=BACKEND == "jax")
    target = np.random.default_rng(3).standard_normal(x.shape).astype("float32")
    for _ in range(steps):
        model.train_on_batch(arrays, target)
    return [to_numpy(w) for w in model.trainable_weights]


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("kind", [*slow_where_compiled("encoder", "decoder"), "crossing"])
@pytest.mark.parametrize("dropout", [*slow_where_compiled(0.0), 0.3])
def test_gradients_equal_those_of_the_plain_function(kind, dropout):
    x, encoded = inputs(), inputs(length=5, width=6, seed=4) if kind == "crossing" else None
    mask = np.arange(7) < np.array([[4], [7]])
    results = []
    for stack_class in (TwoStreams, ReversibleStack):
        keras.utils.set_random_seed(1)
        blocks = make_blocks(kind, dropout=dropout, attention_dropout=dropout)
        # Two steps: the second draws other random numbers.
        results.append(trained(stack_class(blocks), x, encoded, mask, steps=2))
    keras.utils.set_random_seed(1)
    stack = ReversibleStack(make_blocks(kind, dropout=dropout, attention_dropout=dropout))
    start = trained(stack, x, encoded, mask, steps=0)
    changes = [[a - b for a, b in zip(result, start, strict=True)] for result in results]
    assert_gradients_close(changes[1], changes[0])
    assert all(np.abs(change).max() > 1e-6 for change in changes[0])


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch has autocast")
def test_the_backward_pass_computes_in_the_types_of_autocast():
    import torch

    results = []
    for stack_class in (TwoStreams, ReversibleStack):
        keras.utils.set_random_seed(1)
        stack = stack_class(make_blocks("encoder"))
        x = torch.tensor(inputs(), requires_grad=True)
        stack.build(tuple(x.shape))
        with torch.autocast("cpu", torch.bfloat16):
            output = stack(x)
        weights = [w.value for w in stack.trainable_weights]
        results.append(torch.autograd.grad(output.float().square().sum(), [x, *weights]))
    # In float32 it would be 0.01: the streams that come back would be those of another function.
    for found, expected in zip(*results, strict=True):
        assert relative_rms(found, expected) < 1e-3


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("kind", ["decoder", "crossing"])
def test_a_stream_equals_one_call(kind):
    stack = ReversibleStack(make_blocks(kind))
    x, encoded = inputs(length=9), inputs(length=5, width=6, seed=4)
    extra = [encoded] if kind == "crossing" else []
    expected = call(stack, x, *extra)
    state, memories = [block.initial_state(2) for block in stack.blocks], None
    if kind == "crossing":
        memories = [block.encoder_memory(encoded) for block in stack.blocks]
    outputs = []
    for start, stop in itertools.pairwise((0, 3, 4, 9)):
        output, state = call(stack.call_with_state, x[:, start:stop], state, None, memories)
        outputs.append(to_numpy(output))
    assert_close(np.concatenate(outputs, axis=1), expected, "layer")


@pytest.mark.slow_on_jax
def test_padding_and_keras_masks_count():
    stack = ReversibleStack(make_blocks("encoder"))
    ids = np.array([[3, 1, 2, 0, 0], [1, 2, 3, 4, 5]])
    embedding = keras.layers.Embedding(6, 11, mask_zero=True)
    symbol = keras.Input((None,), dtype="int32")
    hidden = stack(embedding(symbol))
    model = keras.Model(symbol, [hidden, keras.layers.GlobalAveragePooling1D()(hidden)])
    hidden, pooled = (to_numpy(y) for y in model(ids))
    alone = to_numpy(stack(to_numpy(embedding(ids[:1, :3]))))
    assert_close(hidden[:1, :3], alone, "layer")
    assert_close(pooled[:1], alone.mean(axis=1), "layer")
    assert_close(stack(to_numpy(embedding(ids)), padding_mask=ids != 0), hidden, "layer")


def test_saves_and_loads(tmp_path):
    symbol = keras.Input((None, 11))
    model = keras.Model(symbol, ReversibleStack(make_blocks("decoder"))(symbol))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(inputs(), verbose=0), model.predict(inputs(), verbose=0)
    )


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_half_precision_keeps_the_streams_in_float32():
    blocks = make_blocks("encoder", count=6, dtype="mixed_bfloat16")
    stack = ReversibleStack(blocks, dtype="mixed_bfloat16")
    symbol = keras.Input((None, 11))
    model = keras.Model(symbol, stack(symbol))
    assert model.output.dtype == "bfloat16"
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=BACKEND == "jax")
    before = model.get_weights()
    model.train_on_batch(inputs(), inputs(seed=2))
    changes = [np.abs(a - b).max() for a, b in zip(before, model.get_weights(), strict=True)]
    assert np.all(np.isfinite(changes)) and max(changes) > 1e-4


def test_keras_compiles_it_on_jax_only():
    """On TensorFlow XLA would take minutes for a deep stack, and keep what the graph frees."""
    symbol = keras.Input((None, 11))
    model = keras.Model(symbol, ReversibleStack(make_blocks("encoder", count=1))(symbol))
    model.compile("sgd", "mse")
    assert model.jit_compile == (BACKEND == "jax")


@pytest.mark.parametrize("kind", ["encoder", "decoder", "crossing"])
@pytest.mark.parametrize("built", [False, True])
def test_encoder_outputs_go_with_blocks_that_attend_to_them(kind, built):
    x = inputs()
    stack = ReversibleStack(make_blocks(kind, count=2))
    right, wrong = ((x, x), (x,)) if kind == "crossing" else ((x,), (x, x))
    if built:
        stack(*right)
    with pytest.raises(ValueError, match="`encoder_outputs` go with decoder blocks of cross_att"):
        stack(*wrong)


@pytest.mark.skipif(BACKEND != "torch", reason="other backends refuse by themselves or can")
def test_a_second_derivative_is_refused():
    import torch

    stack = ReversibleStack(make_blocks("encoder", count=2))
    x = torch.from_numpy(np.asarray(inputs())).requires_grad_()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)


def test_only_blocks_are_taken():
    with pytest.raises(TypeError, match=r"PerformerEncoderBlocks.*Received: <Dense"):
        ReversibleStack([keras.layers.Dense(3)])
