"""Fetch Debian packages that carry data, check them, and read what is inside."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
    by_hand = f"Fetch {name} {version} from a Debian mirror by hand and save it as {path}."
    if not path.is_file():
        if shutil.which("apt-get") is None:
            raise OSError(f"{name} is a Debian package, and there is no apt-get here. {by_hand}")
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            command = ["apt-get", "download", "-q", f"{name}={version}"]
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
            found = list(Path(scratch).glob("*.deb"))
            if result.returncode or len(found) != 1:
                raise OSError(
                    f"`{' '.join(command)}` failed: {result.stderr.strip() or 'no file came'}. "
                    f"Run `apt-get update` and try again. {by_hand}"
                )
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


def package_files(package: Path) -> Iterator[tuple[str, bytes]]:
    """Walk over the regular files of a Debian package.

    **Returns** Pairs of path and content, one at a time.

    **Raises** OSError if dpkg-deb is missing or cannot read the package.

    **Example**

    >>> dict(package_files(Path("data.deb")))  # doctest: +SKIP
    """
    if shutil.which("dpkg-deb") is None:
        raise OSError(f"{package}: reading it needs dpkg-deb. Install the package dpkg.")
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name.removeprefix("./"), file.read()
