import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from training.data.registry import (
    fetch_debian_package,
    fetch_npm_package,
    fetch_python_package,
    files_by_name,
    package_files,
    replacing,
)

FETCHES = {
    "apt-get": (fetch_debian_package, "x_1_all.deb", "x_1.deb", "download -q x=1"),
    "npm": (fetch_npm_package, "x-1.tgz", "x-1.tgz", "pack x@1"),
}

needs_posix = pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a shell script in the place of a program."""

    def write(name, script):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        return path

    return write


@needs_posix
@pytest.mark.parametrize("client", FETCHES)
def test_a_package_is_fetched_once_and_checked(client, cache, tmp_path, stand_in):
    fetch, made, kept, arguments = FETCHES[client]
    calls = tmp_path / "calls"
    stand_in(client, f'echo "$@" >> {calls}; printf data > {made}')
    digest = hashlib.sha256(b"data").hexdigest()
    for _ in range(2):
        assert fetch("x", "1", digest) == cache / kept
    assert (cache / kept).read_bytes() == b"data"
    assert calls.read_text(encoding="utf-8").splitlines() == [arguments]
    (cache / kept).write_bytes(b"dat0")
    with pytest.raises(ValueError, match="delete it and fetch it again"):
        fetch("x", "1", digest)


def test_a_file_that_two_write_at_once_is_whole_and_a_failure_leaves_nothing(cache):
    path = cache / "table.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert not path.exists()
    assert path.read_text() == "first"  # the outer one ends last
    with pytest.raises(KeyError), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert path.read_text() == "first" and list(cache.iterdir()) == [path]


@needs_posix
@pytest.mark.parametrize("client", FETCHES)
def test_another_file_than_expected_does_not_enter_the_cache(client, cache, stand_in):
    fetch, made, *_ = FETCHES[client]
    stand_in(client, f"printf other > {made}")
    with pytest.raises(ValueError, match="not the package that was expected"):
        fetch("x", "1", hashlib.sha256(b"data").hexdigest())
    assert list(cache.iterdir()) == []


@needs_posix
@pytest.mark.parametrize("client", FETCHES)
def test_a_failing_or_missing_client_is_told(client, cache, tmp_path, monkeypatch, stand_in):
    fetch = FETCHES[client][0]
    stand_in(client, "echo no such package >&2; exit 100")
    with pytest.raises(OSError, match=r"(?s)no such package.*save it as"):
        fetch("x", "1", "0" * 64)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(OSError, match=rf"no {client} here.*save .* as"):
        fetch("x", "1", "0" * 64)


@needs_posix
@pytest.mark.parametrize(
    "source, ending, kind", [(False, "whl", "--only-binary"), (True, "tar.gz", "--no-binary")]
)
def test_pip_fetches_wheels_and_sources(
    source, ending, kind, cache, tmp_path, monkeypatch, stand_in
):
    calls = tmp_path / "calls"
    python = stand_in("python", f'echo "$@" >> {calls}; printf data > x-1-anything.{ending}')
    monkeypatch.setattr(sys, "executable", str(python))
    path = fetch_python_package("x", "1", hashlib.sha256(b"data").hexdigest(), source=source)
    assert path == cache / f"x-1.{ending}"
    called = calls.read_text(encoding="utf-8").strip()
    assert called == f"-m pip download --no-deps {kind} :all: x==1"
    stand_in("python", "echo no network >&2; exit 1")
    with pytest.raises(OSError, match=r"no network.*Download the .* of y 2 from PyPI and save"):
        fetch_python_package("y", "2", "0" * 64, source=source)


def test_the_scope_of_an_npm_package_is_part_of_its_file_name(cache):
    (cache / "a-b-1.tgz").write_bytes(b"data")
    digest = hashlib.sha256(b"data").hexdigest()
    assert fetch_npm_package("@a/b", "1", digest) == cache / "a-b-1.tgz"


@needs_posix
@pytest.mark.parametrize("size", [0, 700, 1024])
def test_a_deb_that_ends_too_early_is_told(tmp_path, stand_in, size):
    with tarfile.open(tmp_path / "whole.tar", "w") as archive:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    start = (tmp_path / "whole.tar").read_bytes()[:size]
    (tmp_path / "start").write_bytes(start)
    stand_in("dpkg-deb", f"cat '{tmp_path / 'start'}'; exit 2")
    with pytest.raises(OSError, match="dpkg-deb"):
        list(package_files(tmp_path / "x.deb"))


@needs_dpkg
def test_files_of_a_debian_package_come_with_their_paths(tmp_path):
    root = tmp_path / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "usr" / "share").mkdir(parents=True)
    control = "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    (root / "DEBIAN" / "control").write_text(control, encoding="utf-8")
    (root / "usr" / "share" / "data").write_bytes(b"content")
    (root / "usr" / "share" / "more").write_bytes(b"else")
    subprocess.run(["dpkg-deb", "--build", str(root), str(tmp_path / "x.deb")], check=True)
    whole = {"usr/share/data": b"content", "usr/share/more": b"else"}
    assert dict(package_files(tmp_path / "x.deb")) == whole
    assert dict(package_files(tmp_path / "x.deb", "*/more")) == {"usr/share/more": b"else"}


def test_files_of_archives_come_with_their_paths(tmp_path):
    whole = {"p/a.txt": b"1", "p/deep/b.txt": b"22", "c.dat": b""}
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.mkdir("p")
        for name, content in whole.items():
            archive.writestr(name, content)
    for ending in ("tgz", "tar.gz"):
        with tarfile.open(tmp_path / f"x.{ending}", "w:gz") as archive:
            folder = tarfile.TarInfo("p")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in whole.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    for ending in ("whl", "tgz", "tar.gz"):
        path = tmp_path / f"x.{ending}"
        assert dict(package_files(path)) == whole
        assert dict(package_files(path, "*/deep/*", "*.dat")) == {
            "p/deep/b.txt": b"22",
            "c.dat": b"",
        }
        assert files_by_name(path, "*.txt") == {"a.txt": b"1", "b.txt": b"22"}
