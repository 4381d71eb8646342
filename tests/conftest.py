"""What holds for every test module."""

import gc
import os

# The kernels for PyTorch run in Triton's interpreter if this is set before Triton is imported,
# which PyTorch does. Set it to 0 to test what runs on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that downloads are kept in, an empty one."""
    from training.data.registry import cache_folder

    monkeypatch.setenv("KERAS_PERFORMER_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def short_steps(monkeypatch):
    """Let short sequences have several steps, of several chunks each, and recompute them."""
    from keras_performer.ops import _chunked, _scan, _sums

    monkeypatch.setattr(_scan, "_KEPT_STEPS", 1)
    monkeypatch.setattr(_sums, "_MOST_CHUNKS", 2)
    monkeypatch.setattr(_sums, "_CHUNKS_UNKNOWN", 2)
    monkeypatch.setattr(_chunked, "_PACKED_CHUNK", _chunked.CHUNK)


@pytest.fixture
def eager(monkeypatch):
    """TensorFlow takes longer to compile than to run a few steps as they are; JAX does not."""
    compile_eagerly(monkeypatch)


@pytest.fixture(scope="module")
def eager_module():
    """The same for all of a module, and for its fixtures."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        compile_eagerly(monkeypatch)
        yield


def compile_eagerly(monkeypatch):
    compile_model = keras.Model.compile

    def compile_model_eagerly(self, *args, **kwargs):
        compile_model(self, *args, **kwargs, run_eagerly=keras.config.backend() == "tensorflow")

    monkeypatch.setattr(keras.Model, "compile", compile_model_eagerly)


def pytest_collection_modifyitems(items):
    """Mark what is `slow_on_` a backend as slow where that runs."""
    for item in items:
        if item.get_closest_marker(f"slow_on_{keras.config.backend()}"):
            item.add_marker(pytest.mark.slow)
