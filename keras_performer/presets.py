"""Find the presets that come with the package, by path and without importing a framework."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# An installed wheel carries the zoo inside the package; a clone has it next to the package.
_ZOOS = (_PACKAGE / "_zoo", _PACKAGE.parent / "zoo")


def presets() -> list[str]:
    """List the names of the presets that come with the package, sorted.

    **Returns** Names that `from_preset` and `preset_path` take.

    **Example**

    >>> isinstance(presets(), list)
    True
    """
    return sorted({path.parent.name for zoo in _ZOOS for path in zoo.glob("*/config.json")})


def preset_path(name: str) -> Path:
    """Return the folder of the preset called `name`.

    **Args**
        name: One of `presets()`.

    **Returns** The folder, which `from_preset` of any keras-hub class takes as a string.

    **Raises** ValueError if there is no such preset; the message lists those that exist.

    **Example**

    >>> preset_path("no-such-preset")
    Traceback (most recent call last):
    ValueError: There is no preset called 'no-such-preset'. ...
    """
    for zoo in _ZOOS:
        if name in presets() and (zoo / name / "config.json").is_file():
            return zoo / name
    raise ValueError(
        f"There is no preset called {name!r}. Pass one of those that come with the package "
        f"({', '.join(presets()) or 'there are none'}) or the path of a folder that "
        f"`save_to_preset` wrote. Received: name={name!r}"
    )
