"""Long-context attention for Keras 3 on TensorFlow, JAX and PyTorch.

Importing the package imports nothing else: `keras_performer.layers` needs keras and numpy only,
`keras_performer.models` brings in keras-hub.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_performer.export import export
    from keras_performer.presets import preset_path, presets, verify

__version__ = "0.1.0"

__all__ = ["__version__", "export", "preset_path", "presets", "verify"]

_HOMES = {
    "export": "export",
    "preset_path": "presets",
    "presets": "presets",
    "verify": "presets",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its name in the package. `export` and `presets`
        # are submodules too, and here their names stand for the functions in them.
        if name in _HOMES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
