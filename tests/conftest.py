"""What holds for every test module."""

import gc

import keras
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_end_with_their_module():
    """Free what JAX compiled: a process may not map more than some tens of thousands of pages."""
    yield
    if keras.config.backend() == "jax":
        import jax
        from gradients import forget_compiled

        forget_compiled()
        jax.clear_caches()
        gc.collect()
