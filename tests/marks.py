"""Marks of single cases of a test."""

import pytest


def slow_on_jax(*cases):
    """Cases that are left to the slow run on JAX, which compiles every new shape."""
    return [pytest.param(case, marks=pytest.mark.slow_on_jax) for case in cases]
