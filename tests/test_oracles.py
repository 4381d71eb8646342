"""The oracles themselves, on cases small enough to work out by hand."""

import numpy as np
import oracles
import pytest


def tokens(*rows):
    """One batch item and one head: (T, H) to (1, T, 1, H)."""
    return np.asarray(rows, np.float64)[None, :, None, :]


def column(output):
    """The first feature of batch item 0 and head 0, over the positions."""
    return output[0, :, 0, 0]


UNIFORM = np.zeros((1, 3, 1, 1))
VALUE = tokens([1.0], [2.0], [6.0])


def test_kernel_weights_are_sums_of_products():
    # Weights 1*1 + 2*1 = 3 and 1*5 + 2*2 = 9: (3*0 + 9*4) / 12 = 3.
    q = np.log(tokens([1.0, 2.0]))
    k = np.log(tokens([1.0, 1.0], [5.0, 2.0]))
    output = oracles.kernel_attention_loop(q, k, tokens([0.0], [4.0]))
    np.testing.assert_allclose(column(output), [3.0], rtol=1e-14)


def test_kernel_output_does_not_depend_on_scale_at_any_size():
    q, k = np.zeros((1, 1, 1, 1)), np.log(tokens([1.0], [3.0]))
    for offset in (0.0, 5000.0, -5000.0):
        output = oracles.kernel_attention_loop(q, k + offset, tokens([0.0], [4.0]))
        np.testing.assert_allclose(column(output), [3.0], rtol=1e-11)


def test_kernel_takes_zero_features():
    # The first key has no feature in common with the query; then no key has.
    with np.errstate(divide="ignore"):
        q, k = np.log(tokens([1.0, 0.0])), np.log(tokens([0.0, 1.0], [1.0, 1.0]))
    output = oracles.kernel_attention_loop(q, k, tokens([7.0], [4.0]))
    np.testing.assert_array_equal(column(output), [4.0])
    output = oracles.kernel_attention_loop(q, k[:, :1], tokens([7.0]))
    np.testing.assert_array_equal(column(output), [0.0])


LOOPS = {
    "kernel": lambda **options: oracles.kernel_attention_loop(UNIFORM, UNIFORM, VALUE, **options),
    "plain": lambda **options: oracles.plain_attention_loop(
        UNIFORM + 1, UNIFORM + 1, VALUE, **options
    ),
    "softmax": lambda **options: oracles.softmax_attention_loop(UNIFORM, UNIFORM, VALUE, **options),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3.0, 3.0, 3.0]),
        ({"causal": True}, [1.0, 1.5, 3.0]),
        ({"key_mask": [[True, False, True]]}, [3.5, 3.5, 3.5]),
        ({"key_mask": [[[False, True, True]]]}, [4.0, 4.0, 4.0]),
        ({"key_mask": [[False, False, False]]}, [0.0, 0.0, 0.0]),
        ({"key_mask": [[False, True, True]], "causal": True}, [0.0, 2.0, 4.0]),
        ({"segment_ids": [[5, 5, 7]]}, [1.5, 1.5, 6.0]),
        ({"segment_ids": [[5, 7, 5]]}, [1.0, 2.0, 6.0]),  # runs, not equal ids
        ({"segment_ids": [[5, 7, 7]], "causal": True}, [1.0, 2.0, 4.0]),
        ({"segment_ids": [[5, 7, 7]], "key_mask": [[False, True, True]]}, [0.0, 4.0, 4.0]),
    ],
)
def test_equal_weights_give_the_mean_of_the_visible_values(loop, options, expected):
    options = {
        name: np.asarray(option) if isinstance(option, list) else option
        for name, option in options.items()
    }
    np.testing.assert_allclose(column(loop(**options)), expected, rtol=1e-14)


def test_a_mask_per_head_is_read_per_head():
    zeros = np.zeros((1, 2, 2, 1))
    value = np.asarray([[[[1.0], [10.0]], [[3.0], [30.0]]]])  # token, then head
    mask = np.asarray([[[True, False], [False, True]]])  # head, then key
    for loop, features in (
        (oracles.kernel_attention_loop, zeros),
        (oracles.plain_attention_loop, zeros + 1),
        (oracles.softmax_attention_loop, zeros),
    ):
        output = loop(features, features, value, key_mask=mask)
        np.testing.assert_array_equal(output[0, :, :, 0], [[1.0, 30.0], [1.0, 30.0]])


def test_plain_weights_and_zero_denominator():
    q = tokens([1.0, 2.0], [0.0, 0.0])
    k = tokens([1.0, 1.0], [5.0, 2.0])
    output = oracles.plain_attention_loop(q, k, tokens([0.0], [4.0]))
    np.testing.assert_allclose(column(output), [3.0, 0.0], rtol=1e-14)


def test_log_features_by_hand():
    # H = 16: the input is halved to (2, 0, ..), |x|^2 / 2 = 2.
    x = np.zeros((1, 1, 1, 16))
    x[..., 0] = 4.0
    projection = np.zeros((2, 16))
    projection[:, 0] = [1.5, -3.0]
    features = oracles.favor_log_features(x, projection)
    np.testing.assert_allclose(features[0, 0, 0], np.array([1.0, -8.0]) - np.log(2) / 2)
    features = oracles.favor_log_features(x, projection, hyperbolic=True)
    expected = np.array([1.0, -8.0, -5.0, 4.0]) - np.log(4) / 2
    np.testing.assert_allclose(features[0, 0, 0], expected)


def test_hyperbolic_pair_is_a_cosh():
    # H = 1, one row: phi(x).phi(y) = exp(-(x^2 + y^2) / 2) cosh(w (x + y)).
    x, y, w = 0.3, -1.1, 0.7
    phi_x, phi_y = (
        np.exp(oracles.favor_log_features(tokens([z]), np.array([[w]]), hyperbolic=True))
        for z in (x, y)
    )
    expected = np.exp(-(x**2 + y**2) / 2) * np.cosh(w * (x + y))
    np.testing.assert_allclose(np.sum(phi_x * phi_y), expected, rtol=1e-14)


def test_log_features_estimate_the_softmax_kernel():
    # H = 1 and a quadrature of the Gaussian in place of random rows: exact up to its error.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x, y = 0.8, 0.5
    log_x, log_y = (oracles.favor_log_features(tokens([z]), nodes[:, None]) for z in (x, y))
    products = np.exp(log_x + log_y)[0, 0, 0] * len(nodes)  # undo the 1/M of the plain mean
    kernel = np.sum(products * weights) / np.sum(weights)
    np.testing.assert_allclose(kernel, np.exp(x * y), rtol=1e-12)


def test_softmax_weights_and_scale():
    # H = 4: q.k / 2 = log 3 for the second key and 0 for the first, so (1*0 + 3*4) / 4 = 3.
    q = tokens([2 * np.log(3.0), 0.0, 0.0, 0.0])
    k = tokens([0.0, 9.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0])
    output = oracles.softmax_attention_loop(q, k, tokens([0.0], [4.0]))
    np.testing.assert_allclose(column(output), [3.0], rtol=1e-14)
    output = oracles.softmax_attention_loop(q * 1e5, k, tokens([0.0], [4.0]))
    np.testing.assert_array_equal(column(output), [4.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sliding_window": 1}, [1.0, 2.0, 6.0]),
        ({"sliding_window": 2}, [1.5, 3.0, 4.0]),
        ({"sliding_window": 3}, [3.0, 3.0, 3.0]),
        ({"sliding_window": 2, "causal": True}, [1.0, 1.5, 4.0]),
    ],
)
def test_sliding_window_is_a_band(options, expected):
    np.testing.assert_allclose(column(LOOPS["softmax"](**options)), expected, rtol=1e-14)


def test_grouped_heads_share_consecutive_keys():
    # Key head 0 weighs the two keys 1:3, key head 1 weighs them 3:1; four query heads.
    query = np.ones((1, 1, 4, 1))
    key = np.log([[1.0, 3.0], [3.0, 1.0]])[None, :, :, None]  # token, then head
    value = np.asarray([[[[0.0], [0.0]], [[4.0], [8.0]]]])
    output = oracles.softmax_attention_loop(query, key, value)
    np.testing.assert_allclose(output[0, 0, :, 0], [3.0, 3.0, 2.0, 2.0], rtol=1e-14)
    with pytest.raises(ValueError, match="must divide"):
        oracles.softmax_attention_loop(query[:, :, :3], key, value)


def test_cross_attention_has_its_own_lengths():
    query, key = np.zeros((1, 2, 1, 1)), UNIFORM
    np.testing.assert_allclose(
        column(oracles.softmax_attention_loop(query, key, VALUE)), [3.0, 3.0], rtol=1e-14
    )
    with pytest.raises(ValueError, match="as many keys as queries"):
        oracles.softmax_attention_loop(query, key, VALUE, segment_ids=np.zeros((1, 2)))


def test_segment_runs():
    np.testing.assert_array_equal(
        oracles.segment_runs(np.asarray([[5, 5, 7, 5], [0, 1, 1, 1]])), [[0, 0, 1, 2], [0, 1, 1, 1]]
    )
