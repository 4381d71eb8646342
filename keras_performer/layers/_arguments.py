"""Checks of constructor arguments that the layers and models share."""

import numbers
from typing import Any

ATTENTIONS = ("performer", "softmax", "sliding_window")


def positive_int(name: str, value: Any) -> int:
    """Return `value` as an int, or raise a ValueError that names the argument.

    **Args**
        name: The argument's name, for the message.
        value: What the caller passed.

    **Returns** `value` as a built-in int.

    **Raises** ValueError if it is not an integer above zero.

    **Example**

    >>> positive_int("num_heads", 4)
    4
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"`{name}` must be an integer above zero. Received: {name}={value!r}")
    return int(value)


def packed_length(value: Any) -> int:
    """Return a `sequence_length` of tokens between a start and an end token, as an int.

    **Raises** ValueError if it is no integer of at least 3.

    **Example**

    >>> packed_length(3)
    3
    """
    length = positive_int("sequence_length", value)
    if length < 3:
        raise ValueError(
            "`sequence_length` must leave room for a token between the start and the end "
            f"token: at least 3. Received: sequence_length={value}"
        )
    return length


def check_known(owner: Any, arguments: dict[str, Any], *names: str) -> None:
    """Raise a TypeError for arguments that are not of `names`, which Keras's models would drop.

    **Example**

    >>> check_known(None, {"name": "encoder"}, "name", "trainable")
    """
    if unknown := sorted(set(arguments) - set(names)):
        raise TypeError(
            f"{type(owner).__name__} has no argument of this name; what belongs to its backbone or "
            "its preprocessor is set there. Received: "
            + ", ".join(f"{name}={arguments[name]!r}" for name in unknown)
        )


def optional_int(name: str, value: Any) -> int | None:
    """As `positive_int`, but None stays None.

    **Example**

    >>> optional_int("key_dim", None)
    """
    return None if value is None else positive_int(name, value)


def dropout_rate(name: str, value: float) -> float:
    """Return `value` if it is a rate of dropout, or raise a ValueError that names the argument.

    **Args**
        name: The argument's name, for the message.
        value: What the caller passed.

    **Returns** `value`.

    **Raises** ValueError if it is not at least 0 and below 1.

    **Example**

    >>> dropout_rate("dropout", 0.1)
    0.1
    """
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1. Received: {name}={value!r}")
    return value


def seed_of(seed: int | None, stream: int = 0) -> int | None:
    """Return the seed of one of the streams of random numbers of a layer, None for None.

    PyTorch's generators hold their state in int32.

    **Example**

    >>> seed_of(7, stream=1), seed_of(2**31 + 5), seed_of(None)
    (8, 5, None)
    """
    return None if seed is None else (seed + stream) % 2**31


def check_near_field(
    exact_window: int | None, num_sink_tokens: int, far_bias: float | None
) -> None:
    """Raise a ValueError unless there is a window where there are sinks or a bias.

    **Args**
        exact_window: An integer above zero, or None.
        num_sink_tokens: An integer of at least zero.
        far_bias: A number, or None.

    **Raises** ValueError otherwise.

    **Example**

    >>> check_near_field(64, 4, None)
    """
    whole = isinstance(num_sink_tokens, numbers.Integral) and not isinstance(num_sink_tokens, bool)
    if not whole or num_sink_tokens < 0 or (num_sink_tokens and exact_window is None):
        raise ValueError(
            "`num_sink_tokens` must be an integer of at least 0, and needs an `exact_window`. "
            f"Received: num_sink_tokens={num_sink_tokens!r}, exact_window={exact_window}"
        )
    if far_bias is not None and (exact_window is None or not isinstance(far_bias, numbers.Real)):
        raise ValueError(
            "`far_bias` must be None or a number, and needs an `exact_window`: without one it "
            f"would cancel. Received: far_bias={far_bias!r}, exact_window={exact_window}"
        )


def split_width(hidden_dim: int, num_heads: int, rotary: bool, key_dim: int | None) -> int:
    """Return the head size H: `key_dim`, or an equal share of the width D.

    **Args**
        hidden_dim: Width D.
        num_heads: Number of heads N.
        rotary: Whether positions are rotary, which needs an even head size.
        key_dim: H, or None for D/N.

    **Returns** H.

    **Raises** ValueError if D does not divide by N, or if `rotary` and H is odd.

    **Example**

    >>> split_width(64, 4, rotary=True, key_dim=None)
    16
    """
    if key_dim is None:
        if hidden_dim % num_heads:
            raise ValueError(
                "The model width must be a multiple of `num_heads` when `key_dim` is None. "
                f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}. Change one of them, or "
                "pass `key_dim`."
            )
        key_dim = hidden_dim // num_heads
    if rotary and key_dim % 2:
        raise ValueError(
            "Rotary positions rotate pairs of channels and need an even head size. Received: "
            f"head size {key_dim} (hidden_dim={hidden_dim}, num_heads={num_heads}). Pass an even "
            "`key_dim` or `rotary_max_wavelength=None`."
        )
    return key_dim


def check_attention(attention: str, sliding_window: int | None) -> None:
    """Raise a ValueError unless `attention` is known and has a window just if it needs one.

    **Args**
        attention: "performer", "softmax" or "sliding_window".
        sliding_window: The window, or None.

    **Raises** ValueError otherwise.

    **Example**

    >>> check_attention("sliding_window", 64)
    """
    if attention not in ATTENTIONS:
        raise ValueError(
            f"`attention` must be one of {ATTENTIONS}. Received: attention={attention!r}"
        )
    if (attention == "sliding_window") != (sliding_window is not None):
        raise ValueError(
            "`sliding_window` is the window of attention='sliding_window', which needs one, and of "
            f"no other. Received: attention={attention!r}, sliding_window={sliding_window}"
        )
