import math

import numpy as np
import pytest
from gradients import attend
from samples import normal
from test_favor_plus_plus import HEAD_DIM, HEADS, KEY_HEADS, built, make_qkv
from tolerances import assert_close, assert_exact, to_numpy

from keras_performer.feature_maps import Trigonometric

pytestmark = pytest.mark.usefixtures("short_steps")


def test_trigonometric_features_are_the_formula():
    feature_map = built(Trigonometric(22, seed=3))
    rows = to_numpy(feature_map.projection).astype("float64")
    assert rows.shape == (11, HEAD_DIM)
    x = normal(2, 3, 5, HEAD_DIM)
    scaled = x.astype("float64") / HEAD_DIM**0.25
    waves = np.concatenate([np.cos(scaled @ rows.T), np.sin(scaled @ rows.T)], axis=-1)
    expected = np.exp(np.sum(scaled**2, axis=-1, keepdims=True) / 2) * waves / math.sqrt(11)
    for is_query in (False, True):
        assert_close(feature_map(x, is_query=is_query), expected)


def test_trigonometric_attention_fails_as_its_docstring_says():
    query, key, value = make_qkv(scale=2.0)
    feature_map = built(Trigonometric(6, seed=3))
    group = HEADS // KEY_HEADS
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    phi_q, phi_k = (to_numpy(feature_map(x)).astype("float64") for x in (query, key))
    weights = np.einsum("btnm,bsnm->bnts", phi_q, phi_k)
    total = np.swapaxes(weights.sum(axis=-1), 1, 2)[..., None]
    assert weights.min() < 0 and total.min() < 0
    output = to_numpy(attend(query, key, value, feature_map, implementation="chunked"))
    expected = np.einsum("bnts,bsnv->btnv", weights, value) / total
    assert_exact(output[total[..., 0] < 0], 0.0)
    safe = total[..., 0] > 0.05 * np.abs(weights).sum(axis=-1).swapaxes(1, 2)
    assert 0 < safe.sum() < safe.size
    np.testing.assert_allclose(output[safe], expected[safe], rtol=1e-3, atol=1e-4)
    assert np.abs(output).max() > 2 * np.abs(value).max()  # not an average of values
