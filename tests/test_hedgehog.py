import numpy as np
import pytest
from gradients import attend
from samples import normal
from test_favor_plus_plus import HEAD_DIM, HEADS, KEY_HEADS, adapted, built, make_qkv
from tolerances import assert_close, assert_exact, to_numpy

from keras_performer.feature_maps import Hedgehog

pytestmark = pytest.mark.usefixtures("short_steps")


def test_hedgehog_is_the_formula():
    feature_map = built(Hedgehog())
    assert_exact(
        feature_map.learned_projection, np.broadcast_to(np.eye(HEAD_DIM), (KEY_HEADS, 7, 7))
    )
    weights = to_numpy(adapted(feature_map).learned_projection).astype("float64")

    def softmax(x, weight):
        z = x.astype("float64") @ weight.T
        e = np.exp(np.concatenate([z, -z], axis=-1))
        return e / e.sum(axis=-1, keepdims=True)

    for shape in ((2, KEY_HEADS, 5, HEAD_DIM), (2, KEY_HEADS, 2, 5, HEAD_DIM)):
        x = normal(*shape)
        expected = [softmax(x[:, k], weights[k]) for k in range(KEY_HEADS)]
        for is_query in (False, True):
            assert_close(feature_map(x, is_query=is_query), np.stack(expected, axis=1))
    x = normal(5, HEAD_DIM)
    assert_close(feature_map(x), softmax(x, weights.mean(axis=0)))
    assert not feature_map.estimates_softmax


def test_hedgehog_holds_at_any_norm():
    query, key, value = make_qkv(scale=300.0)
    output = to_numpy(attend(query, key, value, adapted(Hedgehog()), causal=True))
    assert np.isfinite(output).all()
    assert_close(output[:, 0], np.repeat(value, HEADS // KEY_HEADS, axis=2)[:, 0])
