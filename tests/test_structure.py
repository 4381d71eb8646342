"""The shape of the package: which folder imports which, who knows the backend, and examples."""

import ast
import doctest
import importlib
import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import run
from marks import slow_on_jax
from processes import run_code

import keras_performer
import keras_performer.callbacks
import keras_performer.convert
import keras_performer.feature_maps
import keras_performer.layers
import keras_performer.models

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_performer"
# Each part may import those before it. Presets are found by path, so nothing lies below them.
PARTS = ("presets", "ops", "feature_maps", "layers", "callbacks", "models", "convert", "export")
FRAMEWORKS = {"tensorflow", "jax", "torch"}


def sources(folder):
    return sorted(folder.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    """Full names of what a file imports anywhere in it, but for the eyes of a type checker."""
    names = set()

    def visit(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return names


def part_of(name):
    return name.split(".")[1] if name.count(".") else ""


def test_the_package_consists_of_the_known_parts():
    assert {part_of(module_name(path)) for path in sources(PACKAGE)} == {"", *PARTS}


@pytest.mark.parametrize("path", sources(PACKAGE), ids=module_name)
def test_parts_import_from_their_left_only(path):
    part = part_of(module_name(path))
    for name in imported_modules(path):
        assert name.split(".")[0] not in ("training", "zoo", "tests"), name
        if name.split(".")[0] == "keras_performer" and part:
            assert PARTS.index(part_of(name)) <= PARTS.index(part), name


@pytest.mark.parametrize("path", sources(PACKAGE), ids=module_name)
def test_only_ops_and_export_know_the_backend(path):
    part = part_of(module_name(path))
    if part in ("ops", "export"):
        return
    # Strings are tokenized in tf.data under every backend, and files of PyTorch need PyTorch.
    known = {"models": {"tensorflow"}, "convert": {"torch"}}.get(part, set())
    assert not {name.split(".")[0] for name in imported_modules(path)} & FRAMEWORKS - known
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert not {name for name in called if name.endswith("backend")}


@pytest.mark.parametrize("path", sources(ROOT / "training"), ids=module_name)
def test_training_uses_what_the_package_exports(path):
    """Underscored modules are the package's own business."""
    for name in imported_modules(path):
        if name.startswith("keras_performer"):
            assert not any(part.startswith("_") for part in name.split(".")), name


def test_nothing_imports_the_benchmarks():
    for path in (*sources(ROOT / "training"), *sources(ROOT / "zoo")):
        if "benchmarks" not in path.parts:
            used = [name for name in imported_modules(path) if name.startswith("training.bench")]
            assert not used, path


def test_layers_import_keras_and_numpy_only():
    """No framework but the backend's own, and no keras-hub, which brings in TensorFlow."""
    script = (
        "import json, sys, keras, numpy as np; before = set(sys.modules)\n"
        "from keras_performer.layers import PerformerEncoderBlock\n"
        "new = sorted({m.split('.')[0] for m in set(sys.modules) - before})\n"
        "PerformerEncoderBlock(2, 8)(np.ones((1, 3, 8), 'float32'))\n"
        "print(json.dumps([new, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    imported, after_a_call = json.loads(run_code(script).splitlines()[-1])
    assert "keras_performer" in imported
    assert not set(imported) & (FRAMEWORKS | {"keras_hub", "h5py"})
    assert "keras_hub" not in after_a_call
    assert ("tensorflow" in after_a_call) == (keras.config.backend() == "tensorflow")


def test_a_backend_that_a_signal_killed_fails_the_run(monkeypatch):
    monkeypatch.setattr(run, "run", lambda backend, arguments: -9 if backend == "jax" else 0)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 1


MODULES = [module_name(p) for folder in (PACKAGE, ROOT / "training") for p in sources(folder)]
ONLY_JAX = "keras_performer.ops.sharded_favor_attention"


@pytest.mark.parametrize("name", [ONLY_JAX, *slow_on_jax(*(m for m in MODULES if m != ONLY_JAX))])
def test_examples_of_docstrings(name):
    if name == "keras_performer.ops._triton":
        if keras.config.backend() != "torch":
            pytest.skip("loading Triton after JAX ends the process")
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    names = {"keras": keras, "np": np, "keras_performer": keras_performer}
    for home in (keras_performer.convert, keras_performer.models, keras_performer.layers):
        names.update({public: getattr(home, public) for public in home.__all__})
    result = doctest.testmod(
        module,
        extraglobs={k: v for k, v in names.items() if k not in vars(module)},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.failed == 0


def public_objects():
    for home in ("ops", "feature_maps", "layers", "callbacks", "models", "convert"):
        module = importlib.import_module(f"keras_performer.{home}")
        for name in module.__all__:
            yield pytest.param(getattr(module, name), id=f"{home}.{name}")
    for name in keras_performer.__all__:
        if name != "__version__":
            yield pytest.param(getattr(keras_performer, name), id=name)


@pytest.mark.parametrize("item", list(public_objects()))
def test_public_docstrings_have_an_example(item):
    assert ">>>" in (item.__doc__ or "")
