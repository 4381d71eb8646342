"""`PerformerAttention` through the public Keras API, against NumPy and `MultiHeadAttention`."""

import inspect
import itertools
import json

import keras
import numpy as np
import oracles
import pytest
from gradients import compiled
from keras import ops
from samples import normal
from tolerances import assert_close, assert_exact, relative_rms, to_numpy

from keras_performer.feature_maps import ELU, FavorPlus, GeneralizedKernel
from keras_performer.layers import PerformerAttention
from keras_performer.layers.rotary import rotate

MultiHeadAttention = keras.layers.MultiHeadAttention
BACKEND = keras.config.backend()

BATCH, LENGTH, KEY_LENGTH = 2, 7, 11
WIDTH, VALUE_WIDTH, KEY_WIDTH = 13, 17, 19
FEATURES = 23


def assert_layer_close(actual, expected):
    assert_close(actual, expected, "layer")


def make_inputs(length=LENGTH, seed=0):
    return normal(BATCH, length, WIDTH, seed=seed)


def make_cross_inputs(length=LENGTH, key_length=KEY_LENGTH):
    return (
        normal(BATCH, length, WIDTH, seed=1),
        normal(BATCH, key_length, VALUE_WIDTH, seed=2),
        normal(BATCH, key_length, KEY_WIDTH, seed=3),
    )


def make_layer(num_heads=4, key_dim=6, **options):
    defaults = {"num_features": FEATURES, "seed": 1, "bias_initializer": "random_normal"}
    if "feature_map" in options:
        del defaults["num_features"]
    return PerformerAttention(num_heads, key_dim, **{**defaults, **options})


def build(layer, *inputs):
    if not layer.built:
        layer.build(*(x.shape for x in inputs))
    return layer


def run(layer, query, value, key=None, **options):
    """Call the layer outside any model; compiled as a whole under JAX."""
    inputs = [query, value] if key is None else [query, value, key]
    build(layer, *inputs)
    outputs = compiled(lambda *x: layer(*x, **options))(*inputs)
    return [to_numpy(x) for x in outputs] if isinstance(outputs, tuple) else to_numpy(outputs)


# The layer in NumPy, float64, from its weights.


def weight(layer, path):
    return next(to_numpy(w).astype("float64") for w in layer.weights if w.path.endswith(path))


def dense(layer, name, x):
    kernel = weight(layer, f"/{name}/kernel")
    output = np.tensordot(x.astype("float64"), kernel, 2 if name == "attention_output" else 1)
    return output + weight(layer, f"/{name}/bias") if layer.use_bias else output


def numpy_rotate(x, positions, max_wavelength):
    """Dimensions i and i + H/2 as one complex number, turned by position * wavelength^(-2i/H)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    frequency = max_wavelength ** (-np.arange(half) / half)
    positions = np.broadcast_to(positions, x.shape[:2])
    z = z * np.exp(1j * positions[:, :, None, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


def numpy_heads(layer, query, value, key=None, positions=None):
    """Queries, keys and values as attention sees them, one key head for each query head."""
    key = value if key is None else key
    q, k, v = (dense(layer, *x) for x in (("query", query), ("key", key), ("value", value)))
    head_dim = q.shape[-1]
    if layer.qk_norm:
        q, k = (
            x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * head_dim**-0.25
            for x in (q, k)
        )
        q, k = q * weight(layer, "/query_norm/scale"), k * weight(layer, "/key_norm/scale")
    if layer.rotary_max_wavelength is not None:
        q, k = (
            numpy_rotate(
                x,
                np.arange(x.shape[1]) if positions is None else positions,
                layer.rotary_max_wavelength,
            )
            for x in (q, k)
        )
    groups = q.shape[2] // k.shape[2]
    return q, np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)


def numpy_output(layer, query, attended):
    if layer.use_gate:
        attended = attended / (1 + np.exp(-dense(layer, "gate", query)))
    return dense(layer, "attention_output", attended)


def oracle(layer, query, value, key=None, *, positions=None, key_mask=None, **options):
    q, k, v = numpy_heads(layer, query, value, key, positions)
    projection = weight(layer, "/projection")
    if key_mask is not None and key_mask.ndim == 3:
        key_mask = np.repeat(key_mask, q.shape[2] // key_mask.shape[1], axis=1)
    attended = oracles.kernel_attention_loop(
        *(oracles.favor_log_features(x, projection) for x in (q, k)),
        v,
        key_mask=key_mask,
        **options,
    )
    return numpy_output(layer, query, attended)


# The interface of MultiHeadAttention.


def parameters(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_every_constructor_argument_is_accepted():
    ours = {p.name: p for p in parameters(PerformerAttention.__init__)}
    theirs = parameters(MultiHeadAttention.__init__)
    assert [p.name for p in theirs if p.name not in ours] == []
    assert {p.name: p.default for p in theirs} == {p.name: ours[p.name].default for p in theirs}
    # The same places too, but for `seed`, the last one.
    names = [p.name for p in theirs if p.kind != p.VAR_KEYWORD]
    assert names[-1] == "seed"
    assert list(ours)[: len(names) - 1] == names[:-1]


@pytest.mark.parametrize("method", ["call", "compute_output_spec"])
def test_every_call_argument_is_accepted_at_its_place(method):
    ours = parameters(getattr(PerformerAttention, method))
    theirs = parameters(getattr(MultiHeadAttention, method))
    expected = [(p.name, p.default) for p in theirs]
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == expected


def test_public_methods_and_properties_are_there():
    missing = {n for n in dir(MultiHeadAttention) if n[0] != "_"} - set(dir(make_layer()))
    assert missing == set()


WEIGHT_OPTIONS = {
    "plain": {},
    "gate": {"use_gate": True},
    "value_dim": {"value_dim": 5},
    "output_int": {"output_shape": 29},
    "output_tuple": {"output_shape": (29, 3)},
    "no_bias": {"use_bias": False},
    "all": {"use_gate": True, "value_dim": 5, "output_shape": [29, 3], "use_bias": False},
}


def names_and_shapes(layer):
    return [(w.path.split("/", 1)[1], tuple(w.shape)) for w in layer.weights]


@pytest.mark.parametrize("name", WEIGHT_OPTIONS)
def test_weights_have_the_names_shapes_and_order_of_multi_head_attention(name):
    options = WEIGHT_OPTIONS[name]
    inputs = make_cross_inputs()
    ours = build(make_layer(3, 4, qk_norm=True, **options), *inputs)
    theirs = build(MultiHeadAttention(3, 4, **options), *inputs)
    expected = names_and_shapes(theirs)
    assert names_and_shapes(ours)[: len(expected)] == expected
    assert names_and_shapes(ours)[len(expected) :] == [
        ("query_norm/scale", (4,)),
        ("key_norm/scale", (4,)),
        ("feature_map/projection", (FEATURES, 4)),
    ]
    for sublayer in ("query", "key", "value", "output"):
        assert getattr(ours, f"{sublayer}_dense").equation == (
            getattr(theirs, f"{sublayer}_dense").equation
        )
    # Compared as declared: calling Keras's own layer fails on JAX where value_dim is not key_dim.
    shape = theirs.compute_output_shape(*(x.shape for x in inputs))
    assert ours.compute_output_shape(*(x.shape for x in inputs)) == shape
    assert run(ours, *inputs).shape == shape


def test_initial_weights_differ_between_sublayers():
    layer = build(make_layer(), make_inputs(), make_inputs())
    kernels = [to_numpy(x.kernel) for x in (layer.query_dense, layer.key_dense, layer.value_dense)]
    assert all(np.abs(kernels[i] - kernels[i - 1]).max() > 0.1 for i in range(3))


@pytest.mark.parametrize("name", WEIGHT_OPTIONS)
def test_from_attention_moves_the_weights(name):
    inputs = make_cross_inputs()
    attention = build(MultiHeadAttention(3, 4, name="mine", **WEIGHT_OPTIONS[name]), *inputs)
    drawn = [normal(*w.shape, seed=i, scale=0.3) for i, w in enumerate(attention.weights)]
    attention.set_weights(drawn)
    layer = PerformerAttention.from_attention(attention, num_features=FEATURES)
    assert layer.name == "mine"
    weights = attention.get_weights()
    for ours, theirs in zip(layer.get_weights(), weights, strict=False):
        assert_exact(ours, theirs)
    assert layer.count_params() == attention.count_params() + FEATURES * 4
    attention.set_weights([0 * w for w in weights])
    assert_exact(layer.get_weights()[0], weights[0])  # a copy
    assert_layer_close(run(layer, *inputs), oracle(layer, *inputs))


def test_from_attention_keeps_the_configuration():
    attention = MultiHeadAttention(
        3, 4, dropout=0.25, kernel_regularizer="l2", attention_axes=(1,), dtype="mixed_bfloat16"
    )
    layer = PerformerAttention.from_attention(attention, seed=5, name="other", qk_norm=True)
    assert not layer.built
    config, expected = layer.get_config(), attention.get_config()
    changed = {"seed": 5, "name": "other"}
    assert {name: config[name] for name in expected} == {**expected, **changed}
    assert config["qk_norm"] is True
    x = make_inputs()
    attention(x, x)
    layer = PerformerAttention.from_attention(attention, num_features=FEATURES)
    assert layer.dtype_policy.name == layer.query_dense.dtype_policy.name == "mixed_bfloat16"
    assert keras.backend.standardize_dtype(layer.query_dense.kernel.dtype) == "float32"
    assert_exact(layer.query_dense.kernel, attention.query_dense.kernel)
    assert keras.backend.standardize_dtype(layer(x, x).dtype) == "bfloat16"


def test_from_attention_refuses_what_it_cannot_take_over():
    with pytest.raises(TypeError, match=r"MultiHeadAttention. Received: <GroupedQueryAttention"):
        PerformerAttention.from_attention(keras.layers.GroupQueryAttention(4, 4, 2))
    x = make_inputs()
    attention = build(MultiHeadAttention(4, 6), x, x)
    for options, names in (
        ({"num_key_value_heads": 2}, r"'key'.*\(13, 4, 6\).*\(13, 2, 6\)"),
        ({"key_dim": 8}, r"'query'.*\(13, 4, 6\).*\(13, 4, 8\)"),
        ({"use_bias": False}, r"'query'"),
        ({"output_shape": 5}, r"'attention_output'"),
    ):
        with pytest.raises(ValueError, match=rf"weights of {names}.*Received: options="):
            PerformerAttention.from_attention(attention, **options)
    assert not hasattr(attention, "_feature_map")


@pytest.mark.parametrize("causal", [False, True])
def test_with_many_features_the_output_is_that_of_multi_head_attention(causal):
    x = make_inputs(length=LENGTH)
    attention = build(MultiHeadAttention(3, 5, use_bias=False), x, x)
    kernels = [normal(*w.shape, seed=i, scale=0.2) for i, w in enumerate(attention.weights)]
    attention.set_weights(kernels)
    expected = to_numpy(attention(x, x, use_causal_mask=causal))
    layer = PerformerAttention.from_attention(attention, num_features=8192, seed=0)
    error = relative_rms(run(layer, x, x, use_causal_mask=causal), expected)
    attention.set_weights([0 * kernels[0], *kernels[1:]])  # every key weighs the same
    uniform = relative_rms(attention(x, x, use_causal_mask=causal), expected)
    assert error < 0.04
    assert error < 0.1 * uniform


# Against NumPy.

OPTIONS = {
    "plain": {},
    "value_dim": {"value_dim": 5, "output_shape": 29},
    "gate": {"use_gate": True, "use_bias": False},
    "grouped": {"num_key_value_heads": 2},
    "qk_norm": {"qk_norm": True},
    "rotary": {"rotary_max_wavelength": 100.0},
    "all": {
        "value_dim": 5,
        "use_gate": True,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "rotary_max_wavelength": 10000,
    },
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_equals_numpy(name, causal):
    layer = make_layer(**OPTIONS[name])
    x = make_inputs()
    build(layer, x, x)
    if layer.qk_norm:  # with the factor of the layer, its scales start at one
        for w in layer.weights:
            if w.path.endswith("norm/scale"):
                assert_close(w, np.full(6, 6**0.25))
                w.assign(1 + normal(6, seed=len(w.path), scale=0.2))
    output = run(layer, x, x, use_causal_mask=causal)
    assert_layer_close(output, oracle(layer, x, x, causal=causal))


@pytest.mark.parametrize(("length", "key_length"), [(7, 11), (11, 7), (1, 3), (3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_equals_numpy(length, key_length, causal):
    # Causal with other lengths: query t sees the keys 0 to t, as in MultiHeadAttention.
    inputs = make_cross_inputs(length, key_length)
    mask = np.ones((BATCH, key_length), bool)
    mask[0, key_length // 2 :] = False
    mask[:, 0] = True
    layer = make_layer(num_key_value_heads=2)
    options = {"key_mask": mask, "use_causal_mask": causal}
    output = run(layer, *inputs, **options)
    assert_layer_close(output, oracle(layer, *inputs, key_mask=mask, causal=causal))


def key_mask(*shape, seed=5):
    mask = np.random.default_rng(seed).random(shape) > 0.4
    mask[..., 0] = True
    return mask


MASK_SHAPES = {
    "1S": (1, KEY_LENGTH),
    "B1S": (BATCH, 1, KEY_LENGTH),
    "B11S": (BATCH, 1, 1, KEY_LENGTH),
    "B11": (BATCH, 1, 1),
    "BK1S": (BATCH, 2, 1, KEY_LENGTH),
}


@pytest.mark.parametrize("dtype", ["bool", "int32"])
@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masks_of_keys_equal_numpy(shape, dtype):
    inputs = make_cross_inputs()
    layer = make_layer(num_key_value_heads=2)
    mask = key_mask(*MASK_SHAPES[shape])
    if shape == "BK1S":
        expected = oracle(layer_built(layer, inputs), *inputs, key_mask=mask[:, :, 0])
    else:
        plain = np.broadcast_to(mask.reshape(-1, mask.shape[-1]), (BATCH, KEY_LENGTH))
        expected = oracle(layer_built(layer, inputs), *inputs, key_mask=plain)
    assert_layer_close(run(layer, *inputs, attention_mask=mask.astype(dtype)), expected)


def layer_built(layer, inputs):
    return build(layer, *inputs)


def test_all_masks_count_together():
    inputs = make_cross_inputs()
    layer = build(make_layer(num_key_value_heads=2), *inputs)
    by_value, by_key = (key_mask(BATCH, KEY_LENGTH, seed=seed) for seed in (1, 2))
    by_attention = key_mask(BATCH, 2, 1, KEY_LENGTH, seed=3)
    merged = by_attention[:, :, 0] & (by_value & by_key)[:, None]
    masks = {"value_mask": by_value, "key_mask": by_key, "attention_mask": by_attention}
    for left_out in masks:
        rest = [m for name, m in masks.items() if name != left_out]
        assert (merged != np.logical_and.reduce(np.broadcast_arrays(*map(four, rest)))).any()
    assert_layer_close(run(layer, *inputs, **masks), oracle(layer, *inputs, key_mask=merged))


def four(mask):
    return mask if mask.ndim == 4 else mask[:, None, None]


def test_an_explicit_key_mask_counts_without_a_key():
    x = make_inputs()
    layer = build(make_layer(), x, x)
    mask = key_mask(BATCH, LENGTH)
    expected = oracle(layer, x, x, key_mask=mask)
    assert_layer_close(run(layer, x, x, key_mask=mask), expected)
    assert_layer_close(run(layer, x, x, x, key_mask=mask), expected)


@pytest.mark.filterwarnings("error:Layer .* was passed an input with a mask")
def test_keras_masks_are_used_and_handed_on():
    # From Embedding to the query, and from Masking to the value.
    layer = make_layer()
    embedding = keras.layers.Embedding(5, WIDTH, mask_zero=True)
    ids, memory = keras.Input((None,), dtype="int32"), keras.Input((None, VALUE_WIDTH))
    masked = keras.layers.Masking(9.0)(memory)
    hidden = layer(embedding(ids), masked, attention_mask=None)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    model = keras.Model([ids, memory], [hidden, pooled])
    tokens = np.array([[1, 2, 3, 0, 0, 0, 0], [4, 3, 2, 1, 4, 3, 2]])
    values = make_cross_inputs()[1]
    mask = key_mask(BATCH, KEY_LENGTH)
    values[~mask] = 9.0
    hidden, pooled = (to_numpy(x) for x in model([tokens, values]))
    expected = oracle(layer, to_numpy(embedding(tokens)), values, key_mask=mask)
    assert_layer_close(hidden, expected)
    assert_layer_close(pooled, [hidden[0, :3].mean(axis=0), hidden[1].mean(axis=0)])


def test_keras_masks_join_attention_mask():
    layer = make_layer()
    embedding = keras.layers.Embedding(5, WIDTH, mask_zero=True)
    ids, extra = keras.Input((None,), dtype="int32"), keras.Input((1, None), dtype="bool")
    hidden = embedding(ids)
    model = keras.Model([ids, extra], layer(hidden, hidden, attention_mask=extra))
    tokens = np.array([[1, 2, 3, 0, 2, 0, 0], [4, 3, 2, 1, 4, 3, 2]])
    mask = key_mask(BATCH, LENGTH)
    x = to_numpy(embedding(tokens))
    expected = oracle(layer, x, x, key_mask=mask & (tokens != 0))
    assert_layer_close(model([tokens, mask[:, None]]), expected)
    assert relative_rms(oracle(layer, x, x, key_mask=mask), expected) > 0.01


@pytest.mark.parametrize(
    "shape",
    [
        (BATCH, LENGTH, KEY_LENGTH),
        (1, LENGTH, KEY_LENGTH),
        (BATCH, 4, LENGTH, KEY_LENGTH),
        (BATCH, 3, 1, KEY_LENGTH),
        (BATCH, LENGTH),
        (BATCH, KEY_LENGTH),
        (5, KEY_LENGTH),
        (KEY_LENGTH,),
    ],
)
def test_masks_of_pairs_are_refused_with_what_can_be_done(shape):
    inputs = make_cross_inputs()
    layer = build(make_layer(), *inputs)
    with pytest.raises(ValueError) as error:
        layer(*inputs, attention_mask=np.ones(shape, bool))
    message = str(error.value)
    for part in ("(batch, 11)", "(batch, 4, 1, 11)", "use_causal_mask=True", "segment_ids"):
        assert part in message
    assert f"Received: attention_mask of shape {shape}" in message


@pytest.mark.parametrize("causal", [False, True])
def test_segments_equal_separate_calls(causal):
    layer = make_layer(num_key_value_heads=2, rotary_max_wavelength=100.0)
    x = make_inputs()
    segment_ids = np.array([[5, 5, 5, 2, 2, 2, 2]] * BATCH)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3]] * BATCH)
    options = {"use_causal_mask": causal}
    packed = run(layer, x, x, segment_ids=segment_ids, positions=positions, **options)
    parts = [run(layer, part, part, **options) for part in (x[:, :3], x[:, 3:])]
    assert_layer_close(packed, np.concatenate(parts, axis=1))
    assert relative_rms(run(layer, x, x, positions=positions, **options), packed) > 0.01


# Padding.


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("garbage", [1e3, np.nan])
@pytest.mark.parametrize("options", [{}, {"use_causal_mask": True}], ids=["full", "causal"])
def test_a_padded_batch_equals_its_rows(side, garbage, options):
    layer = make_layer(rotary_max_wavelength=100.0, qk_norm=True, use_gate=True)
    x = make_inputs()
    lengths = (4, 7)
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    alone = [
        run(layer, row[m][None], row[m][None], **options)[0] for row, m in zip(x, mask, strict=True)
    ]
    x[~mask] = garbage
    padded = run(layer, x, x, key_mask=mask, **options)
    for row, m, expected in zip(padded, mask, alone, strict=True):
        assert_layer_close(row[m], expected)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 2}], ids=["performer", "window"])
def test_a_query_without_keys_gives_zeros(options):
    if "sliding_window" not in options:
        options = {**options, "feature_map": FavorPlus(FEATURES)}
    layer = make_layer(use_bias=False, num_features=None, **options)
    x = make_inputs()
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1] = False
    output = run(layer, x, x, key_mask=mask)
    assert_exact(output[1], np.zeros((LENGTH, WIDTH)))
    assert np.abs(output[0]).min(axis=-1).all()
    mask = np.arange(LENGTH) >= [[3]] * BATCH
    causal = run(layer, x, x, key_mask=mask, use_causal_mask=True)
    assert_exact(causal[:, :3], np.zeros((BATCH, 3, WIDTH)))
    assert np.abs(causal[:, 3:]).max(axis=-1).all()


# Rotary positions.


def test_rotate_equals_numpy():
    x = normal(2, 5, 3, 8)
    for positions in (np.arange(5), np.array([[7, 0, 2, 901, 3], [0, -4, 1, 1, 30_000]])):
        expected = numpy_rotate(x.astype("float64"), positions, 500.0)
        np.testing.assert_allclose(
            to_numpy(rotate(x, positions, 500.0))[:, :2], expected[:, :2], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(to_numpy(rotate(x, positions, 500.0)), expected, atol=1e-2)


def test_rotation_is_relative_and_keeps_norms():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def product(i, j):
        rotated = [to_numpy(rotate(x, np.array([p]), 100.0)) for x, p in ((q, i), (k, j))]
        return float(np.sum(rotated[0] * rotated[1]))

    np.testing.assert_allclose(product(9, 4), product(5, 0), rtol=1e-4)
    assert abs(product(9, 4) - product(4, 9)) > 1e-2
    x = normal(2, 5, 3, 8)
    turned = to_numpy(rotate(x, np.arange(5), 100.0))
    np.testing.assert_allclose(np.sum(turned**2, axis=-1), np.sum(x**2, axis=-1), rtol=1e-5)
    assert_exact(turned[:, 0], x[:, 0])


def test_angles_of_large_positions_are_exact_in_bfloat16():
    x = ops.cast(normal(1, 2, 1, 4), "bfloat16")
    turned = rotate(x, np.array([257, 1001]), 100.0)  # bfloat16 has neither number
    assert keras.backend.standardize_dtype(turned.dtype) == "bfloat16"
    assert_close(turned, numpy_rotate(to_numpy(x), np.array([257, 1001]), 100.0), "bfloat16")


@pytest.mark.parametrize("shape", [(LENGTH,), (BATCH, LENGTH)])
def test_given_positions_equal_numpy(shape):
    layer = make_layer(rotary_max_wavelength=100.0)
    x = make_inputs()
    build(layer, x, x)
    positions = np.random.default_rng(0).integers(0, 50, shape)
    output = run(layer, x, x, positions=positions)
    assert_layer_close(output, oracle(layer, x, x, positions=positions))
    assert relative_rms(run(layer, x, x), output) > 0.01


# A sliding window.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("window", "length", "key_length"),
    [(1, 7, 7), (2, 7, 7), (5, 7, 11), (5, 11, 7), (100, 7, 11)],
)
def test_sliding_window_equals_multi_head_attention(window, length, key_length, causal):
    query, value, key = make_cross_inputs(length, key_length)
    attention = MultiHeadAttention(3, 4, sliding_window=window, bias_initializer="random_normal")
    build(attention, query, value, key)
    layer = PerformerAttention.from_attention(attention)
    assert names_and_shapes(layer) == names_and_shapes(attention)  # and no feature map
    mask = key_mask(BATCH, key_length)
    options = {"attention_mask": mask[:, None], "use_causal_mask": causal}
    output = run(layer, query, value, key, **options)
    expected = to_numpy(attention(query, value, key, **options))
    rows, columns = np.arange(length)[:, None], np.arange(key_length)
    visible = (np.abs(rows - columns) < window) & (not causal or columns <= rows)
    # MultiHeadAttention averages all keys where there is none to see.
    seen = (visible & mask[:, None]).any(axis=-1)
    assert seen.mean() > 0.4
    assert_layer_close(output[seen], expected[seen])


# Scores.


@pytest.mark.parametrize(
    "options",
    [{}, {"num_key_value_heads": 2}, {"sliding_window": 3, "num_features": None}],
    ids=["plain", "grouped", "window"],
)
def test_scores_are_what_the_output_is_made_of(options):
    layer = make_layer(**options)
    x = make_inputs()
    mask = np.ones((BATCH, LENGTH), bool)
    mask[0, 2] = mask[1, 4:6] = False  # never a whole window
    options = {"key_mask": mask, "use_causal_mask": True}
    output, scores = run(layer, x, x, return_attention_scores=True, **options)
    assert scores.shape == (BATCH, 4, LENGTH, LENGTH)
    np.testing.assert_allclose(scores.sum(axis=-1), 1.0, rtol=1e-5)
    assert (scores >= 0).all()
    assert (scores[:, :, ~np.tri(LENGTH, dtype=bool)] == 0).all()
    assert (np.moveaxis(scores, -1, 1)[~mask] == 0).all()
    value = numpy_heads(layer, x, x)[2]
    attended = np.einsum("bnts,bsnv->btnv", scores, value)
    assert_layer_close(output, numpy_output(layer, x, attended))
    assert_layer_close(output, run(layer, x, x, **options))


@pytest.mark.parametrize(("length", "key_length"), [(5, 7), (7, 5)])
@pytest.mark.parametrize("options", [{}, {"feature_map": None}], ids=["performer", "softmax"])
def test_causal_scores_have_a_column_for_every_key(length, key_length, options):
    inputs = normal(BATCH, length, WIDTH), normal(BATCH, key_length, VALUE_WIDTH)
    layer = build(make_layer(**options), *inputs)
    output, scores = run(layer, *inputs, use_causal_mask=True, return_attention_scores=True)
    assert scores.shape == (BATCH, 4, length, key_length)
    assert (scores[:, :, ~np.tri(length, key_length, dtype=bool)] == 0).all()
    attended = np.einsum("bnts,bsnv->btnv", scores, numpy_heads(layer, *inputs)[2])
    assert_layer_close(output, numpy_output(layer, inputs[0], attended))


# Dropout.


def test_dropout_does_nothing_at_inference():
    x = make_inputs()
    layer, plain = (build(make_layer(dropout=rate), x, x) for rate in (0.5, 0.0))
    plain.set_weights(layer.get_weights())
    expected = to_numpy(plain(x, x))
    for training in (False, None):
        assert_exact(layer(x, x, training=training), expected)
    assert_exact(plain(x, x, training=True), expected)


def test_dropout_takes_whole_keys_of_single_heads():
    rate, batch = 0.4, 101
    x = normal(batch, LENGTH, WIDTH)
    layer = build(make_layer(dropout=rate, num_key_value_heads=2), x, x)
    mask = np.ones((batch, LENGTH), bool)
    mask[:, 2] = False
    output, scores = layer(x, x, training=True, key_mask=mask, return_attention_scores=True)
    output, scores = to_numpy(output), to_numpy(scores)
    kept = (scores > 0).any(axis=2)  # (B, N, S)
    rows = scores.sum(axis=-1)
    # All queries of a head lose the same keys, from numerator and denominator alike.
    assert_exact(scores > 0, np.broadcast_to(kept[:, :, None], scores.shape))
    np.testing.assert_allclose(
        rows, np.broadcast_to(kept.any(axis=-1)[..., None], rows.shape), rtol=1e-5
    )
    assert not kept[:, :, 2].any()
    # Query heads 0, 1 share one key head and 2, 3 another; the two are dropped independently.
    assert_exact(kept[:, 0], kept[:, 1])
    drawn = kept[:, ::2][..., np.arange(LENGTH) != 2]
    agree = np.mean(drawn[:, 0] == drawn[:, 1])
    count = drawn[:, 0].size
    for frequency, expected, size in (
        (drawn.mean(), 1 - rate, 2 * count),
        (agree, rate**2 + (1 - rate) ** 2, count),
    ):
        assert abs(frequency - expected) < 5 * np.sqrt(expected * (1 - expected) / size)
    value = numpy_heads(layer, x, x)[2]
    attended = np.einsum("bnts,bsnv->btnv", scores, value)
    assert_layer_close(output, numpy_output(layer, x, attended))


@pytest.mark.slow_on_jax
def test_dropout_keeps_segments_apart_where_a_state_is_asked_for():
    # A dropped first token must not pass for padding, which is of the segment before it.
    segment_ids = np.repeat([[0, 1, 2, 3]], BATCH, 0).repeat(3, 1)
    x = make_inputs(12)
    other = x.copy()
    other[:, :3] = make_inputs(3, seed=9)
    options = {"use_causal_mask": True, "segment_ids": segment_ids, "training": True}
    outputs = []
    first = build(make_layer(num_heads=1, dropout=0.6), x, x)
    for inputs in (x, other):
        layer = build(make_layer(num_heads=1, dropout=0.6), x, x)  # one seed, the same keys
        layer.set_weights(first.get_weights())
        drawn = [layer(inputs, inputs, return_state=True, **options)[0] for _ in range(5)]
        outputs.append(np.stack([to_numpy(output) for output in drawn]))
    np.testing.assert_array_equal(outputs[0][:, :, 3:], outputs[1][:, :, 3:])


@pytest.mark.parametrize("segments", [False, True])
def test_dropout_leaves_the_grid_of_blocks_where_it_is(segments):
    # Nearly all keys are dropped, the first ones of rows and segments never.
    mask = np.arange(LENGTH) >= [[0], [2]]
    segment_ids = np.where(np.arange(LENGTH) < 4, 1, 2)[None].repeat(BATCH, 0)
    layer = make_layer(num_key_value_heads=1, dropout=0.999, exact_window=2)
    x = make_inputs()
    kept = {"key_mask": (np.arange(LENGTH) == [[0], [2]])}
    options = {"key_mask": mask}
    if segments:
        options["segment_ids"] = kept["segment_ids"] = segment_ids
        kept["key_mask"] = kept["key_mask"] | (np.arange(LENGTH) == 4)
    output = to_numpy(build(layer, x, x)(x, x, training=True, **options))
    assert_layer_close(output[mask], to_numpy(layer(x, x, **kept))[mask])


def test_dropout_is_drawn_for_every_call_and_keeps_the_mean():
    # Rows of one batch are independent draws of one example.
    x = np.repeat(make_inputs()[:1], 2003, axis=0)
    layer, twin = (build(make_layer(dropout=0.2, seed=3), x, x) for _ in range(2))
    twin.set_weights(layer.get_weights())
    first, second = (to_numpy(layer(x, x, training=True)) for _ in range(2))
    assert relative_rms(second, first) > 0.05
    assert relative_rms(first[1], first[0]) > 0.05
    assert_exact(twin(x, x, training=True), first)  # the seed decides
    # The mean over all 2^7 sets of keys that may be kept.
    _, scores = layer(x[:1], x[:1], return_attention_scores=True)
    kept = np.array(list(itertools.product([False, True], repeat=LENGTH)))
    probability = np.prod(np.where(kept, 0.8, 0.2), axis=-1)
    weights = to_numpy(scores)[:, None] * kept[:, None, None]  # (1, sets, N, T, S) by broadcasting
    total = np.maximum(weights.sum(axis=-1, keepdims=True), 1e-30)
    mean = np.einsum("c,bcnts->bnts", probability, weights / total)
    attended = np.einsum("bnts,bsnv->btnv", mean, numpy_heads(layer, x[:1], x[:1])[2])
    expected = numpy_output(layer, x[:1], attended)[0]
    standard_error = first.std(axis=0) / np.sqrt(len(first))
    assert (np.abs(first.mean(axis=0) - expected) < 5 * standard_error).all()


def test_dropout_of_nearly_everything_stays_finite():
    x = normal(31, 3, WIDTH)
    layer = make_layer(dropout=0.9, qk_norm=True)
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, layer(inputs, inputs))
    rows = to_numpy(layer(x, x, training=True))
    bias = to_numpy(layer.output_dense.bias)
    empty = np.all(np.isclose(rows, bias, atol=1e-6), axis=-1)
    assert np.isfinite(rows).all() and 0.1 < empty.mean() < 1  # 0.9 ** 12 = 0.28
    model.compile("sgd", "mse")
    before = layer.get_weights()
    model.fit(x, x, batch_size=31, epochs=1, verbose=0)
    for w in layer.weights:
        assert np.isfinite(to_numpy(w)).all(), w.path
    assert np.abs(before[0] - layer.get_weights()[0]).max() > 0


# Query and key normalisation.


def test_qk_norm_makes_norms_of_inputs_irrelevant_and_learns_its_scales():
    layer = make_layer(qk_norm=True, use_bias=False)
    x = make_inputs()
    value = normal(BATCH, LENGTH, WIDTH, seed=4)
    output = run(layer, x, value, x)
    np.testing.assert_allclose(run(layer, 50 * x, value, 7 * x), output, rtol=1e-4, atol=1e-4)
    q, _, _ = numpy_heads(layer, x, value, x)
    np.testing.assert_allclose(np.sum(q**2, axis=-1), 6, rtol=1e-4)
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, layer(inputs, inputs))
    model.compile("sgd", "mse")
    model.fit(x, value, epochs=1, verbose=0)
    for path in ("/query_norm/scale", "/key_norm/scale"):
        assert np.abs(weight(layer, path) - 6**0.25).max() > 1e-6
    assert [w.path.split("/")[-2] for w in layer.non_trainable_weights] == ["feature_map"]


# Other axes.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", [1, 2, -2, -3])
def test_attention_along_one_axis_equals_looping_over_the_other(axis, causal):
    layer = make_layer(attention_axes=axis, rotary_max_wavelength=100.0)
    x = normal(BATCH, 3, 5, WIDTH)
    first = axis in (1, -3)
    options = {"use_causal_mask": causal}
    output, scores = run(layer, x, x, return_attention_scores=True, **options)
    assert output.shape == x.shape
    single = build(make_layer(rotary_max_wavelength=100.0), x[:, 0], x[:, 0])
    single.set_weights(layer.get_weights())
    for i in range(5 if first else 3):
        part = x[:, :, i] if first else x[:, i]
        expected, expected_scores = run(single, part, part, return_attention_scores=True, **options)
        assert_layer_close(output[:, :, i] if first else output[:, i], expected)
        assert_layer_close(scores[:, i], expected_scores)


@pytest.mark.parametrize("axis", [1, 2])
def test_keras_masks_follow_the_attention_axis(axis):
    layer = make_layer(attention_axes=(axis,))
    x = normal(BATCH, 3, 5, WIDTH)
    mask = key_mask(BATCH, 3, 5)
    x[~mask] = 9.0
    inputs = keras.Input((3, 5, WIDTH))
    masked = keras.layers.Masking(9.0)(inputs)
    output = to_numpy(keras.Model(inputs, layer(masked, masked))(x))
    single = build(make_layer(), x[:, 0], x[:, 0])
    single.set_weights(layer.get_weights())
    x = np.where(mask[..., None], x, 0)  # as Masking hands it on
    for i in range(5 if axis == 1 else 3):
        part, m, actual = (a[:, :, i] if axis == 1 else a[:, i] for a in (x, mask, output))
        assert_layer_close(actual, run(single, part, part, key_mask=m))


# Configuration.

NON_DEFAULT = {
    "num_heads": 4,
    "key_dim": 6,
    "value_dim": 5,
    "dropout": 0.25,
    "use_bias": False,
    "output_shape": (29, 3),
    "attention_axes": (1,),
    "sliding_window": 3,
    "kernel_initializer": "he_normal",
    "bias_initializer": "ones",
    "kernel_regularizer": keras.regularizers.L2(0.125),
    "bias_regularizer": "l1",
    "activity_regularizer": keras.regularizers.L1(0.5),
    "kernel_constraint": "non_neg",
    "bias_constraint": keras.constraints.MaxNorm(3),
    "use_gate": True,
    "num_features": FEATURES,
    "feature_map": FavorPlus(22, hyperbolic=True, seed=4),
    "exact_window": 5,
    "num_sink_tokens": 2,
    "far_bias": -1.5,
    "num_key_value_heads": 2,
    "qk_norm": True,
    "rotary_max_wavelength": 500.0,
    "seed": 3,
}


def test_every_argument_is_in_the_config():
    names = {p.name for p in parameters(PerformerAttention.__init__) if p.kind != p.VAR_KEYWORD}
    assert names - set(NON_DEFAULT) == {"flash_attention"}  # which can only be None
    assert names - set(make_layer().get_config()) == {"flash_attention"}


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("name", NON_DEFAULT)
def test_config_round_trip(name):
    required = {"num_heads": 4, "key_dim": 6, "seed": 1}
    if name in ("num_sink_tokens", "far_bias"):
        required["exact_window"] = 3
    layer = PerformerAttention(**{**required, name: NON_DEFAULT[name]})
    config = json.loads(json.dumps(layer.get_config()))
    twin = PerformerAttention.from_config(config)
    assert json.loads(json.dumps(twin.get_config())) == config
    default = PerformerAttention(**required, name=layer.name).get_config()
    if name not in ("num_heads", "key_dim"):
        assert {n for n in config if config[n] != json.loads(json.dumps(default))[n]} == {name}
    x = make_inputs()
    build(layer, x, x), build(twin, x, x)
    assert names_and_shapes(twin) == names_and_shapes(layer)
    twin.set_weights(layer.get_weights())
    assert_exact(run(twin, x, x), run(layer, x, x))


@pytest.mark.filterwarnings("error:Gradients do not exist")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [3, 8, 9])
def test_the_far_bias_trains_where_nothing_is_far(causal, length):
    inputs = keras.Input((length, WIDTH))
    layer = PerformerAttention(2, 4, exact_window=4, far_bias=-1.0, seed=1)
    model = keras.Model(inputs, layer(inputs, inputs, use_causal_mask=causal))
    model.compile(keras.optimizers.SGD(1.0), "mse")
    x = make_inputs(length)
    model.fit(x, x, verbose=0)
    bias = to_numpy(model.trainable_weights[-1])
    # Of three blocks the outer two are far from each other.
    assert (np.abs(bias + 1.0).min() > 1e-7) == (length > 8)


@pytest.mark.parametrize(
    "options",
    [
        {"num_key_value_heads": 2, "qk_norm": True, "use_gate": True, "seed": None},
        {"feature_map": FavorPlus(22, hyperbolic=True), "rotary_max_wavelength": 100.0},
        {"feature_map": "elu"},
        {"feature_map": "relu", "num_features": 19, "seed": None},
    ],
    ids=["favor_plus", "instance", "elu", "relu"],
)
def test_saved_model_loads_bit_equal(options, tmp_path):
    query, value, key = (keras.Input((None, d)) for d in (WIDTH, VALUE_WIDTH, KEY_WIDTH))
    mask = keras.Input((None,), dtype="bool")
    layer = make_layer(**options)
    outputs = layer(query, value, key, key_mask=mask, use_causal_mask=True)
    model = keras.Model([query, value, key, mask], outputs)
    model.save(tmp_path / "model.keras")
    keras.utils.set_random_seed(99)
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    inputs = [*make_cross_inputs(KEY_LENGTH), key_mask(BATCH, KEY_LENGTH)]
    assert_exact(loaded(inputs), model(inputs))
    model.save_weights(tmp_path / "model.weights.h5")
    twin = keras.models.clone_model(model)
    twin.load_weights(tmp_path / "model.weights.h5")
    assert_exact(twin(inputs), model(inputs))


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({}, 3),
        ({"output_shape": (29, 3)}, 3),
        ({"output_shape": 5, "attention_axes": np.int64(2)}, 4),
    ],
)
def test_symbolic_shape_is_the_eager_shape(options, rank):
    shape = (BATCH, LENGTH, WIDTH) if rank == 3 else (BATCH, 3, LENGTH, WIDTH)
    memory_shape = (*shape[:-2], KEY_LENGTH, VALUE_WIDTH)
    query, memory = normal(*shape), normal(*memory_shape)
    layer = make_layer(dtype="mixed_float16", **options)
    for scores in (False, True):
        call = {"return_attention_scores": scores}
        symbolic = layer(
            keras.Input(shape[1:], BATCH), keras.Input(memory_shape[1:], BATCH), **call
        )
        eager = layer(query, memory, **call)
        for s, e in zip(*((x if scores else [x]) for x in (symbolic, eager)), strict=True):
            assert tuple(s.shape) == tuple(e.shape)
            assert s.dtype == keras.backend.standardize_dtype(e.dtype) == "float16"
    unknown = layer(keras.Input((*shape[1:-2], None, WIDTH)), keras.Input(memory_shape[1:]))
    assert unknown.shape[-1 - len(layer.compute_output_shape(shape, shape)[rank - 1 :])] is None


def test_masks_at_their_place_in_a_functional_model():
    x = make_inputs()
    layer = build(make_layer(), x, x)
    inputs, mask = keras.Input((None, WIDTH)), keras.Input((None,), dtype="bool")
    symbolic = layer(inputs, inputs, inputs, mask, mask, mask)
    values = key_mask(BATCH, LENGTH)
    output = keras.Model([inputs, mask], symbolic)([x, values])
    assert_layer_close(output, run(layer, x, x, key_mask=values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, r"`num_heads` must be an integer above zero. Received: num_heads=0"),
        ({"key_dim": 2.5}, r"`key_dim` must be an integer above zero. Received: key_dim=2.5"),
        ({"value_dim": -1}, r"`value_dim` must be an integer above zero"),
        ({"sliding_window": 0}, r"`sliding_window` must be an integer above zero"),
        ({"num_key_value_heads": 3}, r"must divide num_heads.*num_key_value_heads=3"),
        ({"dropout": 1.0}, r"`dropout` must be at least 0 and below 1. Received: dropout=1.0"),
        ({"dropout": "half"}, r"`dropout` must be at least 0 and below 1"),
        ({"flash_attention": True}, r"no[t]? .*: leave it None. Received: flash_attention=True"),
        ({"attention_axes": (1, 2)}, r"along one axis.*Received: attention_axes=\(1, 2\)"),
        ({"attention_axes": "time"}, r"an integer.*Received: attention_axes='time'"),
        ({"rotary_max_wavelength": -1.0}, r"must be positive"),
        ({"rotary_max_wavelength": 100.0, "key_dim": 5}, r"key_dim even.*key_dim=5"),
        ({"num_features": 0}, r"`num_features` must be an integer above zero"),
        ({"exact_window": 0}, "`exact_window` must be an integer above zero"),
        ({"num_sink_tokens": 2}, "needs an `exact_window`"),
        ({"exact_window": 4, "feature_map": "relu"}, "does not estimate"),
        ({"exact_window": 4, "sliding_window": 4}, "this layer's attention is exact"),
        ({"exact_window": 4, "feature_map": None}, "this layer's attention is exact"),
        ({"feature_map": "favour"}, r"one of \['elu', 'favor_plus', .*'relu'\]"),
        ({"feature_map": ELU(), "num_features": 5}, r"own number of features"),
    ],
)
def test_constructor_explains_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PerformerAttention(**{"num_heads": 4, "key_dim": 6, **options})


@pytest.mark.parametrize(
    ("options", "shapes", "message"),
    [
        ({}, [(2, 3, 5, 13)] * 2, r"pass attention_axes, or reshape.*attention_axes=None"),
        ({}, [(2, 13)] * 2, r"at least three.*query_shape=\(2, 13\)"),
        ({}, [(2, 7, 13), (2, 3, 7, 13)], r"one number of axes"),
        ({}, [(2, 7, 13), (2, 11, 17), (2, 5, 19)], r"agree in all axes but the last"),
        ({"attention_axes": 2}, [(2, 7, 13)] * 2, r"between the batch and the feature axis"),
        ({"attention_axes": 0}, [(2, 7, 13)] * 2, r"between the batch and the feature axis"),
    ],
)
def test_build_explains_what_it_refuses(options, shapes, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options).build(*shapes)


def test_masks_that_do_not_fit_more_axes_are_refused():
    x = normal(BATCH, 3, 5, WIDTH)
    layer = build(make_layer(attention_axes=2), x, x)
    with pytest.raises(ValueError, match=r"3 axes before the features.*shape \(2, 5\)"):
        layer(x, x, value_mask=np.ones((BATCH, 5), bool))
    with pytest.raises(ValueError, match="inputs of three axes"):
        layer(x, x, attention_mask=np.ones((BATCH, 5), bool))


# Precision.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_mixed_precision(dtype, causal):
    x = make_inputs()
    exact = build(make_layer(), x, x)
    layer = build(make_layer(dtype=f"mixed_{dtype}"), x, x)
    layer.set_weights(exact.get_weights())
    options = {"use_causal_mask": causal}
    output = layer(x, x, **options)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    error = relative_rms(output, exact(x, x, **options))
    # The projections before and after attention round too: twice the tolerance of the op.
    assert error < {"float16": 1e-2, "bfloat16": 2e-2}[dtype]
    loud = to_numpy(layer(1000 * x, x, 1000 * x, **options))
    assert np.isfinite(loud).all()
    assert np.abs(loud).max() > 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("policy", ["mixed_", ""])
def test_a_state_stays_float32_under_every_policy(dtype, policy):
    x = make_inputs()
    layer = build(make_layer(dtype=policy + dtype), x, x)
    options = {"use_causal_mask": True, "return_state": True}
    expected, whole = layer(x, x, **options)
    state, outputs = layer.initial_state(BATCH), []
    for t in range(LENGTH):
        token = x[:, t : t + 1]
        output, state = layer(token, token, initial_state=state, **options)
        outputs.append(to_numpy(output))
    error = relative_rms(np.concatenate(outputs, axis=1), expected)
    assert error < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for name in ("kv", "k_sum", "log_max"):
        # What a token adds is rounded where it is computed, and the sum never.
        assert keras.backend.standardize_dtype(state[name].dtype) == "float32"
        assert relative_rms(state[name], whole[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_sliding_window_in_mixed_precision(dtype):
    x = make_inputs()
    layer = make_layer(sliding_window=3, num_features=None, dtype=dtype)
    assert np.isfinite(to_numpy(layer(30 * x, x, 30 * x))).all()


# Training and compilation.


def fit_one_step(layer, x, y, jit=True, **options):
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, layer(inputs, inputs, **options))
    model.compile("adam", "mse", jit_compile=jit and BACKEND != "torch")
    history = model.fit(x, y, epochs=2, batch_size=BATCH, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][1] < history["loss"][0]
    return model


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"qk_norm": True, "rotary_max_wavelength": 100.0}, {"use_causal_mask": True}),
        ({"dropout": 0.1, "num_key_value_heads": 2, "use_gate": True}, {}),
        ({"sliding_window": 3, "num_features": None}, {"use_causal_mask": True}),
    ],
    ids=["causal", "bidirectional", "window"],
)
def test_compiled_training_step(options, call):
    keras.utils.set_random_seed(0)
    layer = make_layer(**options)
    x = make_inputs(length=131)
    projection = None
    build(layer, x, x)
    if layer.feature_map is not None:
        projection = to_numpy(layer.feature_map.projection)
    before = layer.get_weights()
    fit_one_step(layer, x, np.roll(x, 1, axis=1), **call)
    moved = [
        np.abs(to_numpy(w) - old).max() > 0 for w, old in zip(layer.weights, before, strict=True)
    ]
    # The key's bias cancels in the quotient where nothing else depends on it; all else learns.
    trainable = [w.trainable for w in layer.weights]
    assert [m for m, t in zip(moved, trainable, strict=True) if not t] == [False] * (
        projection is not None
    )
    assert all(moved[i] for i, w in enumerate(layer.weights) if w.path.endswith("kernel"))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow traces unknown lengths")
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 65, "num_features": None}], ids=["performer", "window"]
)
@pytest.mark.parametrize("causal", [False, True])
def test_one_graph_serves_all_lengths(options, causal):
    import tensorflow as tf

    layer = make_layer(rotary_max_wavelength=100.0, num_key_value_heads=2, **options)
    spec = [tf.TensorSpec((None, None, d)) for d in (WIDTH, VALUE_WIDTH)]

    @tf.function(input_signature=spec)
    def graph(query, value):
        return layer(query, value, use_causal_mask=causal)

    for length, key_length in [(1, 1), (5, 5), (257, 257), (131, 131), (300, 5), (5, 300)]:
        query, value, _ = make_cross_inputs(length, key_length)
        assert_layer_close(graph(query, value), layer(query, value, use_causal_mask=causal))


def test_lora_finds_its_layers():
    x = make_inputs()
    layer = build(make_layer(), x, x)
    before = run(layer, x, x)
    for dense_layer in (layer.query_dense, layer.value_dense):
        dense_layer.enable_lora(2)
    assert_layer_close(run(layer, x, x), before)
    frozen = to_numpy(layer.query_dense._kernel)
    fit_one_step(layer, x, np.roll(x, 1, axis=1))
    assert_exact(layer.query_dense._kernel, frozen)
    assert np.abs(to_numpy(layer.query_dense.kernel) - frozen).max() > 0


@pytest.mark.slow_on_tensorflow
def test_sublayers_quantize():
    x = make_inputs()
    inputs = keras.Input((None, WIDTH))
    layer = make_layer()
    model = keras.Model(inputs, layer(inputs, inputs))
    before = to_numpy(model(x))
    model.quantize("int8")
    assert keras.backend.standardize_dtype(layer.query_dense._kernel.dtype) == "int8"
    error = relative_rms(model(x), before)
    assert 0 < error < 0.05


# What a layer owns.


@pytest.mark.parametrize("built", [False, True])
def test_layers_given_one_feature_map_have_their_own(built):
    x = make_inputs()
    given = FavorPlus(FEATURES, seed=5)
    if built:
        given.build((None, 6))
    layers = [build(make_layer(feature_map=given), x, x) for _ in range(2)]
    assert given.built == built
    maps = [given, *(layer.feature_map for layer in layers)]
    assert len({id(m) for m in maps}) == 3
    assert len({id(m.projection) for m in maps if m.built}) == 2 + built
    assert_exact(layers[0].feature_map.projection, layers[1].feature_map.projection)
    for layer in layers:  # the instance itself is no sublayer
        assert [w.path.split("/", 1)[1] for w in layer.weights if not w.trainable] == [
            "feature_map/projection"
        ]


def test_feature_maps_make_a_difference():
    x = make_inputs()
    maps = ["favor_plus", "relu", "elu", GeneralizedKernel("softplus")]
    outputs = []
    for feature_map in maps:
        layer = build(make_layer(feature_map=feature_map), x, x)
        for i, w in enumerate(layer.trainable_weights):
            w.assign(normal(*w.shape, seed=i, scale=0.3))
        outputs.append(run(layer, x, x))
    for i in range(len(maps)):
        assert relative_rms(outputs[i], outputs[i - 1]) > 0.01


def test_regularizers_and_constraints_are_those_of_multi_head_attention():
    options = {
        "kernel_regularizer": "l2",
        "bias_regularizer": "l1",
        "activity_regularizer": keras.regularizers.L2(0.5),
        "kernel_constraint": "non_neg",
        "bias_constraint": "unit_norm",
        "bias_initializer": "ones",
    }
    x = make_inputs()
    attention = MultiHeadAttention(3, 4, use_gate=True, **options)
    build(attention, x, x)
    layer = PerformerAttention.from_attention(attention, num_features=FEATURES)
    attention(x, x), layer(x, x)
    ours, theirs = (np.array([float(to_numpy(v)) for v in o.losses]) for o in (layer, attention))
    assert len(theirs) == 15  # five kernels, biases and outputs
    differs = ~np.isclose(ours, theirs, rtol=1e-5)
    assert differs.sum() <= 1  # the activity of the output, which is another one
    for ours, theirs in zip(layer.weights, attention.weights, strict=False):
        assert type(ours.constraint) is type(theirs.constraint)
        assert theirs.constraint is not None


@pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 unless it is told to")
def test_rotary_positions_in_float64():
    x = make_inputs().astype("float64")
    layer = make_layer(rotary_max_wavelength=100.0, dtype="float64", seed=1)
    narrow = make_layer(rotary_max_wavelength=100.0, seed=1)
    output, expected = layer(x, x), narrow(x.astype("float32"), x.astype("float32"))
    assert keras.backend.standardize_dtype(output.dtype) == "float64"
    narrow.set_weights([w.astype("float32") for w in layer.get_weights()])
    expected = narrow(x.astype("float32"), x.astype("float32"))
    assert_layer_close(keras.ops.cast(output, "float32"), expected)


@pytest.mark.slow_on_jax
def test_dropped_keys_leave_positions_where_they_are():
    """Of a segment the first unmasked key stays, of a row the last one."""
    x, ids = make_inputs(6), np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], "int32")
    mask = np.array([[1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 0]], bool)
    layer = make_layer(dropout=0.999, exact_window=2)
    options = {"key_mask": mask, "segment_ids": ids}
    options |= {"use_causal_mask": True, "return_state": True, "training": True}
    _, state = layer(x, x, **options)
    np.testing.assert_array_equal(to_numpy(state["window_position"]), [2, 4])
    mask = keras.ops.convert_to_tensor(mask)
    kept = to_numpy(layer._drop_keys(keras.ops.ones((2, 6, 4, 3)), mask, ids, True, True))
    np.testing.assert_array_equal(kept.any(axis=1), [[1, 0, 0, 0, 1, 1], [0, 1, 0, 0, 1, 0]])


def test_scores_are_those_of_the_output_where_statistics_move():
    x = make_inputs()
    layer = build(make_layer(feature_map="favor_plus_plus", use_bias=False), x, x)
    output, scores = layer(x, x, return_attention_scores=True, training=True)
    value = to_numpy(layer.value_dense(x))
    attended = np.einsum("bnts,bsnh->btnh", to_numpy(scores), value)
    assert_layer_close(layer.output_dense(attended), output)
    assert int(layer.feature_map.num_updates) == 1
    layer.trainable = False
    layer(x, x, training=True)
    assert int(layer.feature_map.num_updates) == 1


@pytest.mark.parametrize(
    ("shape", "options", "call", "message"),
    [
        ((2, 3, 6, 8), {"attention_axes": 2}, {"segment_ids": np.zeros((2, 6), "int32")}, "axes"),
        ((2, 3, 6, 8), {"attention_axes": 2}, {"positions": np.arange(6)}, "three axes"),
        ((2, 6, 8), {}, {"key_mask": np.ones((3, 6), bool)}, "one row for each of the batch, 2"),
        ((2, 6, 8), {}, {"value_mask": np.ones((2, 5), bool)}, r"each key, 6\..*shape \(2, 5\)"),
        ((2, 6, 8), {}, {"key_mask": np.ones(6, bool)}, r"shape \(6,\)"),
        ((2, 6, 8), {}, {"segment_ids": np.zeros((2, 5), "int32")}, r"here \(2, 6\)"),
        (
            (2, 6, 8),
            {"feature_map": None, "dropout": 0.2},
            {"training": True, "return_state": True, "use_causal_mask": True},
            "which dropout cannot take",
        ),
    ],
)
def test_what_does_not_fit_the_inputs_is_refused(shape, options, call, message):
    x = normal(*shape)
    with pytest.raises(ValueError, match=message):
        make_layer(**options)(x, x, **call)


def test_outer_axes_that_differ_are_refused():
    """Their product may be the same: rows would attend to those of others."""
    layer = make_layer(attention_axes=2)
    with pytest.raises(ValueError, match=r"here 2\. Received: query of shape \(2, 3, 5, 8\), val"):
        layer(normal(2, 3, 5, 8), normal(3, 2, 5, 8))


@pytest.mark.parametrize("feature_map", ["favor_plus", None])
def test_a_memory_takes_the_masks_that_a_call_takes(feature_map):
    layer, x = make_layer(feature_map=feature_map), make_inputs(6)
    mask = np.arange(6)[None] < 4
    output = layer(x, x, key_mask=mask)
    assert_layer_close(layer.read(x, layer.memory(x, mask)), output)
    with pytest.raises(ValueError, match=r"each key, 6\."):
        layer.memory(x, mask[:, :5])


@pytest.mark.parametrize("seed", [2**31 + 5, 2**32 - 1])
def test_seeds_of_any_size_draw_dropout(seed):
    x = make_inputs()
    layer = make_layer(dropout=0.5, seed=seed)
    assert np.abs(to_numpy(layer(x, x, training=True)) - to_numpy(layer(x, x))).max() > 1e-3


def test_positions_of_other_keys_are_refused():
    x = make_inputs(6)
    layer = make_layer(rotary_max_wavelength=100.0)
    with pytest.raises(ValueError, match=r"of one length\. Received: 6 queries, 4 keys"):
        layer(x, x[:, :4], positions=np.arange(6))
    with pytest.raises(ValueError, match=r"of one length\. Received: 1 queries, 6 keys"):
        layer(x[:, :1], x, initial_state=layer.initial_state(BATCH))
    for shape in ((BATCH, 1), (7,), (BATCH, 6, 1)):
        with pytest.raises(ValueError, match=r"positions must be integers of shape \(6,\) or"):
            layer(x, x, positions=np.zeros(shape, "int32"))
