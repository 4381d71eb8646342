"""Find the presets that come with the package, by path and without importing a framework."""

import dataclasses
import hashlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# An installed wheel carries the zoo inside the package; a clone has it next to the package.
_ZOOS = (_PACKAGE / "_zoo", _PACKAGE.parent / "zoo")

_CHECKSUMS = "SHA256SUMS"
_ADVICE = (
    "Copy the preset again from where it came from (delete a downloaded one, and it is downloaded "
    f"again). If you changed the folder yourself, delete its {_CHECKSUMS}."
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """What `presets()` tells of a preset; its card, `README.md` in its folder, tells the rest.

    **Args**
        task: Name of the class in `keras_performer.models` or `keras_performer.convert`.
        summary: What it is, in one sentence.
        parameters: Number of parameters.
        weights_bytes: Size of the files of its weights.
        metrics: Figures of the model on held-out data, the most telling one first.
    """

    task: str
    summary: str
    parameters: int
    weights_bytes: int
    metrics: dict[str, float]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        return (
            f"{self.task}, {self.parameters:,} parameters, {self.weights_bytes / 1e6:.2f} MB: "
            f"{figures}"
        )


def presets() -> dict[str, Preset]:
    """Describe the presets that come with the package, by name in alphabetical order.

    **Returns** A description for each name that `from_preset` and `preset_path` take.

    **Raises** ValueError if the `metrics.json` of a preset cannot be used; the message names it.

    **Example**

    >>> print(presets()["performer_tiny"])
    PerformerMaskedLM, ... parameters, 0.0... MB: perplexity ...
    """
    return {name: _describe(folder) for name, folder in sorted(_folders().items())}


def preset_path(name: str) -> str:
    """Return the folder of the preset called `name`, for `from_preset` of any keras-hub class.

    A preset that lives at a URL is downloaded into Keras's cache when it is first asked for.

    **Args**
        name: One of `presets()`.

    **Returns** The folder.

    **Raises** ValueError if there is no such preset, and the message lists those that exist; also
    if a download is not the file that was published.

    **Example**

    >>> preset_path("no-such-preset")
    Traceback (most recent call last):
    ValueError: There is no preset called 'no-such-preset'. ...
    """
    folders = _folders()
    if name not in folders:
        raise ValueError(
            f"There is no preset called {name!r}. Pass one of those that come with the package "
            f"({', '.join(sorted(folders)) or 'there are none'}) or the path of a folder that "
            f"`save_to_preset` wrote. Received: name={name!r}"
        )
    return str(local_folder(folders[name]))


def verify(preset: str | os.PathLike[str]) -> None:
    """Check every file of a preset against the sha256 that its folder records.

    `from_preset` of this package's classes does so by itself where a folder has such a record,
    `SHA256SUMS`, which `sha256sum -c` reads too. Hidden files are left out.

    **Args**
        preset: One of `presets()`, or a folder.

    **Raises** ValueError if a file is damaged, missing, or not on record, which the message names,
    or if the folder has no record.

    **Cost** Each file is read and hashed once: about a millisecond for a megabyte.

    **Example**

    >>> verify("performer_tiny")
    """
    folder = local_folder(preset)
    if not (folder / _CHECKSUMS).is_file():
        raise ValueError(f"{str(folder)!r} has no {_CHECKSUMS}, so it cannot be checked.")
    verify_folder(folder)


def verify_folder(folder: Path) -> None:
    """Check a local folder if it carries checksums, and raise as `verify` does."""
    record = folder / _CHECKSUMS
    if not record.is_file():
        return
    expected = _read_checksums(record)
    files = {path.relative_to(folder).as_posix(): path for path in files_on_record(folder)}
    problems = [f"{name!r} is missing" for name in expected.keys() - files.keys()]
    problems += [f"{name!r} is not on record" for name in files.keys() - expected.keys()]
    for name in expected.keys() & files.keys():
        found = sha256(files[name])
        if found != expected[name]:
            problems.append(f"{name!r} is damaged: its sha256 is {found}, not {expected[name]}")
    if problems:
        raise ValueError(
            f"The preset {str(folder)!r} does not match its {_CHECKSUMS}: "
            f"{'; '.join(sorted(problems))}. {_ADVICE}"
        )


def files_on_record(folder: Path) -> list[Path]:
    """Return the files of a preset that have a checksum: all but hidden ones and the record."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path != folder / _CHECKSUMS
        # Operating systems and version control leave files that no loader reads.
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_folder(preset: str | os.PathLike[str]) -> Path:
    """Return the folder with the files of a preset, which is downloaded first if it is remote.

    **Args**
        preset: One of `presets()`, or a folder.

    **Raises** ValueError as `preset_path` does.
    """
    if not os.path.isdir(preset):
        return Path(preset_path(os.fspath(preset)))
    folder = Path(preset)
    return _download(folder) if (folder / "remote.json").is_file() else folder


def _folders() -> dict[str, Path]:
    """Return the folder of each preset by name."""
    return {
        path.parent.name: path.parent
        for zoo in reversed(_ZOOS)  # so that the package's own win
        for path in zoo.glob("*/metrics.json")
    }


def _describe(folder: Path) -> Preset:
    path = folder / "metrics.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Preset(
            task=record["task"],
            summary=record["summary"],
            parameters=record["weights"]["parameters"],
            weights_bytes=record["weights"]["bytes"],
            metrics={metric["name"]: metric["model"] for metric in record["metrics"]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} does not describe a preset ({type(error).__name__}: {error}). {_ADVICE}"
        ) from error


def _read_checksums(path: Path) -> dict[str, str]:
    """Return the recorded sha256 of each file by its name."""
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    matches = [re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line) for line in lines[:-1]]
    if lines[-1] or not all(matches):
        raise ValueError(f"{str(path)!r} is damaged: it has lines that are no checksums. {_ADVICE}")
    return {match[2]: match[1] for match in matches if match}


def _download(folder: Path) -> Path:
    """Return the local copy of a preset whose `remote.json` gives the URL of a zip file."""
    import keras  # Only here: whoever loads a preset has it.

    remote = json.loads((folder / "remote.json").read_text(encoding="utf-8"))
    url, digest = remote["url"], remote["sha256"]
    name = f"{folder.name}-{digest[:16]}"
    try:
        archive = keras.utils.get_file(
            f"{name}.zip",
            origin=url,
            file_hash=digest,
            hash_algorithm="sha256",
            cache_subdir="keras_performer",
        )
    except ValueError as error:
        raise ValueError(
            f"The preset {folder.name!r} was not loaded: what came from {url} is damaged, its "
            f"sha256 is not {digest}. Try again later; a copy is kept only once it is whole."
        ) from error
    target = Path(archive).with_suffix("")
    if not target.is_dir():
        # Renamed when complete, so that a killed process leaves no half of a preset.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            with zipfile.ZipFile(archive) as file:
                file.extractall(Path(scratch) / name)
            os.replace(Path(scratch) / name, target)
    return target
