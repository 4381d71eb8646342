"""Feature maps with weights that are trained, and what a file keeps of them."""

import keras
import numpy as np
import pytest
from gradients import gradients
from keras import ops
from samples import normal
from test_favor_plus_plus import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KEY_HEADS,
    LENGTH,
    adapted,
    built,
    make_qkv,
    statistics_of,
)
from test_feature_maps import MAPS
from tolerances import assert_close, assert_exact, assert_gradients_close, to_numpy

from keras_performer.feature_maps import FavorPlus, FavorPlusPlus, ReLU
from keras_performer.layers import PerformerAttention
from keras_performer.ops import favor_attention
from keras_performer.ops._chunked import CHUNK

pytestmark = pytest.mark.usefixtures("short_steps")

LEARNING = [name for name in MAPS if name.startswith("trained") or name == "hedgehog"]


@pytest.mark.parametrize("name", ["favor_plus_plus", *LEARNING])
@pytest.mark.parametrize("causal", [False, True])
def test_chunked_equals_reference(name, causal):
    """Outputs, and gradients by query, key, value and the projection."""
    feature_map = adapted(MAPS[name]())
    arrays = make_qkv(2 * CHUNK + 9)  # more than one step
    weights = list(feature_map.trainable_weights)
    assert len(weights) == (name in LEARNING)
    cotangent = normal(*arrays[0].shape[:3], 5, seed=8)  # the gradient by it is the output

    def run(implementation):
        def fn(cotangent, query, key, value, *values):
            with keras.StatelessScope(state_mapping=zip(weights, values, strict=True)):
                options = {"causal": causal, "implementation": implementation}
                output = favor_attention(query, key, value, feature_map, **options)
            return ops.sum(output * cotangent)

        return gradients(fn, cotangent, *arrays, *(to_numpy(w).copy() for w in weights))[1]

    (output, *grads), (expected, *expected_grads) = run("chunked"), run("reference")
    assert_close(output, expected)
    assert_gradients_close(grads, expected_grads)
    assert all(np.abs(grad).max() > 1e-3 for grad in grads)


@pytest.mark.parametrize("name", LEARNING)
def test_a_training_step_moves_what_is_trained(name):
    layer = PerformerAttention(4, HEAD_DIM, num_key_value_heads=2, feature_map=MAPS[name]())
    inputs = keras.Input((LENGTH, 5))
    model = keras.Model(inputs, layer(inputs, inputs))
    learned = layer.feature_map.trainable_weights
    assert [w.name for w in learned] in (["projection"], ["learned_projection"])
    before = to_numpy(learned[0]).copy()
    kept = [to_numpy(w).copy() for w in layer.feature_map.non_trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = normal(BATCH, LENGTH, 5)
    model.fit(x, x[:, ::-1], epochs=1, verbose=0)
    assert np.abs(to_numpy(learned[0]) - before).max() > 0
    if name != "trained_favor_plus_plus":  # whose statistics are the layer's to update
        assert kept == []


def test_only_a_projection_that_is_asked_for_is_trained():
    for feature_map in (FavorPlus(11), FavorPlusPlus(11), ReLU(11)):
        assert built(feature_map).trainable_weights == []
    assert FavorPlus(11, trainable_projection=True).get_config()["trainable_projection"] is True


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("name", ["favor_plus_plus", "balanced", "trigonometric", *LEARNING])
def test_saved_layer_loads_bit_equal(name, tmp_path):
    """The file carries the statistics and the learned matrices: nothing here has a seed."""
    feature_map = MAPS[name]()
    config = {k: v for k, v in feature_map.get_config().items() if k != "seed"}
    layer = PerformerAttention(
        HEADS, HEAD_DIM, num_key_value_heads=KEY_HEADS, feature_map=type(feature_map)(**config)
    )
    inputs = keras.Input((LENGTH, 5))
    model = keras.Model(inputs, layer(inputs, inputs))
    layer.feature_map.update_statistics(*make_qkv(seed=5)[:2])
    for weight in layer.feature_map.trainable_weights:
        weight.assign(weight + normal(*weight.shape, scale=0.1))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.weights, loaded.weights, strict=True):
        assert_exact(theirs, to_numpy(ours))
    if isinstance(feature_map, FavorPlusPlus):
        assert np.abs(statistics_of(loaded.layers[1].feature_map)).min() > 0
        assert int(to_numpy(loaded.layers[1].feature_map.num_updates)) == 1
    x = normal(BATCH, LENGTH, 5)
    assert_exact(loaded(x), model(x))
