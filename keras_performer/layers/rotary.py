"""Rotary position embedding."""

from typing import Any

from keras import backend, ops

from keras_performer.ops._chunks import by_hand


def rotate(x: Any, positions: Any, max_wavelength: float) -> Any:
    """Rotate pairs of dimensions by angles proportional to the position.

    Dimension i < H/2 is paired with i + H/2 and turns by position * max_wavelength^(-2i/H), so that
    the product of a rotated query and key depends on the difference of their positions. Rotation
    keeps norms, and is applied before the feature map.

    **Args**
        x: (B, T, N, H) with H even.
        positions: Integers (T,) or (B, T).
        max_wavelength: The wavelength, over 2 pi, that the slowest pair approaches.

    **Returns** (B, T, N, H), of the type of x.

    **Precision** Angles are float32, so they are rounded to 0.03 at position one million, and mean
    nothing from some 10 million on.

    **Example**

    >>> x = np.ones((1, 3, 2, 4), "float32")
    >>> tuple(rotate(x, np.arange(3), 10000.0).shape)
    (1, 3, 2, 4)

    **Source** Su et al. 2021, arXiv 2104.09864, section 3.2.2.
    """
    half = x.shape[-1] // 2
    frequency = ops.power(
        ops.cast(max_wavelength, "float32"), -ops.arange(half, dtype="float32") / half
    )
    angle = ops.expand_dims(ops.cast(positions, "float32"), -1) * frequency
    if len(angle.shape) == 2:
        angle = ops.expand_dims(angle, 0)
    angle = ops.expand_dims(angle, 2)
    dtype = backend.standardize_dtype(x.dtype)
    wide = backend.result_type(dtype, "float32")
    x, cos, sin = (ops.cast(t, wide) for t in (x, ops.cos(angle), ops.sin(angle)))
    if hand := by_hand(x, cos, sin):
        return ops.cast(hand.rotate(x, cos, sin), dtype)
    first, second = x[..., :half], x[..., half:]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return ops.cast(ops.concatenate(rotated, axis=-1), dtype)
