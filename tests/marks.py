"""Marks of single cases of a test."""

import pytest

COMPILED = (pytest.mark.slow_on_jax, pytest.mark.slow_on_tensorflow)


def slow_on_jax(*cases):
    """Cases that are left to the slow run on JAX, which compiles every new shape."""
    return [pytest.param(case, marks=pytest.mark.slow_on_jax) for case in cases]


def slow_on_torch(*cases):
    """Cases that are left to the slow run on PyTorch."""
    return [pytest.param(case, marks=pytest.mark.slow_on_torch) for case in cases]


def slow_where_compiled(*cases):
    """Cases that are left to the slow run on JAX and TensorFlow."""
    return [pytest.param(case, marks=COMPILED) for case in cases]


def slow_where_interpreted(*cases):
    """Cases of fused kernels that are left to the slow run, as long as interpreters run them."""
    marks = (pytest.mark.slow_on_jax, pytest.mark.slow_on_torch)
    return [pytest.param(case, marks=marks) for case in cases]
