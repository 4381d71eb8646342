"""The one table of tolerances, and the comparisons that read it.

Actual and expected may be tensors of the backend or NumPy arrays. float32 and gradients are
compared entry by entry; 16-bit types by the root mean square of the difference, relative to that
of the expected array. What must survive a round trip is compared with `assert_exact`.
"""

from typing import Any

import keras
import numpy as np

FORWARD = {
    "float32": {"rtol": 1e-5, "atol": 1e-6},
    # A whole layer in float32, whose last projection sums products of order one that may cancel.
    "layer": {"rtol": 1e-5, "atol": 1e-5},
}
GRADIENTS = {"float32": {"rtol": 1e-4, "atol": 1e-5}}
# Sums of exponentials, which have no scale of their own: `atol` is of the largest of them.
STATES = {"rtol": 2e-5, "atol": 1e-5}
RELATIVE_RMS = {"float16": 5e-3, "bfloat16": 1e-2}
# Between two float32 computations of one whole tensor, entries that cancel to nearly zero included.
AGREEMENT = 1e-6


def to_numpy(x: Any) -> np.ndarray:
    """Convert a tensor or an array to NumPy, a bfloat16 one to float32."""
    if keras.ops.is_tensor(x) or isinstance(x, keras.Variable):
        if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
            x = keras.ops.cast(x, "float32")
        return keras.ops.convert_to_numpy(x)
    x = np.asarray(x)
    return x.astype("float32") if x.dtype.name == "bfloat16" else x


def relative_rms(actual: Any, expected: Any) -> float:
    """The root mean square of actual - expected, divided by that of expected."""
    actual, expected = (to_numpy(x).astype("float64") for x in (actual, expected))
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    return float(np.sqrt(np.sum((actual - expected) ** 2) / np.sum(expected**2)))


def assert_close(actual: Any, expected: Any, dtype: str = "float32") -> None:
    """Compare outputs, with the tolerance of the type that `actual` was computed in."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    if dtype in RELATIVE_RMS:
        assert np.isfinite(actual).all()
        error = relative_rms(actual, expected)
        assert error <= RELATIVE_RMS[dtype], f"relative RMS {error:.3g}"
        return
    assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
    np.testing.assert_allclose(actual, expected, **FORWARD[dtype])


def assert_gradients_close(actual: Any, expected: Any, dtype: str = "float32") -> None:
    """Compare gradients: one array, or a list or dictionary of them."""
    if isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_gradients_close(a, e, dtype)
    elif isinstance(actual, dict):
        assert set(actual) == set(expected)
        for name in actual:
            assert_gradients_close(actual[name], expected[name], dtype)
    elif dtype in RELATIVE_RMS:
        assert_close(actual, expected, dtype)
    else:
        actual, expected = to_numpy(actual), to_numpy(expected)
        assert actual.shape == expected.shape, f"{actual.shape} != {expected.shape}"
        np.testing.assert_allclose(actual, expected, **GRADIENTS[dtype])


def as_sums(state: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What a state of attention stands for, whatever scale it is kept at."""
    scale = np.exp(to_numpy(state["log_max"]).astype("float64"))
    return scale[..., None] * to_numpy(state["kv"]), scale * to_numpy(state["k_sum"])


def assert_states_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare what two states stand for, relative to the largest of its entries."""
    for a, e in zip(as_sums(actual), as_sums(expected), strict=True):
        atol = STATES["atol"] * np.abs(e).max()
        np.testing.assert_allclose(a, e, rtol=STATES["rtol"], atol=atol)


def assert_exact(actual: Any, expected: Any) -> None:
    """Compare bit for bit."""
    np.testing.assert_array_equal(to_numpy(actual), to_numpy(expected))
