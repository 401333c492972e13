"""Whose libraries the C++ scan loads: none that another user could have put there."""

import os
from types import SimpleNamespace

import pytest
from test_cpp import fresh_library  # noqa: F401
from test_scan import needs_cpp

from megatron_ttt.mixers.ttt.cpp import build

pytestmark = needs_cpp


@pytest.fixture
def built(fresh_library, monkeypatch):  # noqa: F811
    """What was compiled and what was loaded, neither of which happens."""
    done = SimpleNamespace(folder=fresh_library, compiled=[], loaded=[])
    run = build.run

    def compile_nothing(*command):
        if "-o" not in command:
            return run(*command)
        made = command[command.index("-o") + 1]
        done.compiled.append(made)
        with open(made, "w") as file:
            file.write("own")

    def load(path):
        with open(path) as file:
            done.loaded.append(file.read())
        functions = "kept_size", "forward", "backward"
        return SimpleNamespace(**{name: SimpleNamespace() for name in functions})

    monkeypatch.setattr(build, "run", compile_nothing)
    monkeypatch.setattr(build.ctypes, "CDLL", load)
    umask = os.umask(0o002)
    yield done
    os.umask(umask)


def again():
    build.library.cache_clear()
    build.library()


def planted(folder):
    """The library is another's."""
    (path,) = folder.glob("*.so")
    path.write_text("planted")
    return path


def test_folder_and_library_are_private(built):
    build.library()
    again()
    (path,) = built.folder.iterdir()
    assert len(built.compiled) == 1 and built.loaded == ["own", "own"]
    assert [p.stat().st_mode & 0o777 for p in (built.folder, path)] == [0o700, 0o700]


def test_others_can_write_to_the_folder(built):
    build.library()
    planted(built.folder)
    built.folder.chmod(0o770)
    again()
    assert built.loaded == ["own", "own"]
    assert built.folder.stat().st_mode & 0o777 == 0o700


def test_others_can_write_to_the_library(built):
    build.library()
    planted(built.folder).chmod(0o722)
    again()
    assert built.loaded == ["own", "own"]


def test_the_library_is_anothers(built, monkeypatch):
    build.library()
    path = planted(built.folder)
    monkeypatch.setattr(build, "is_own", lambda of: of != path)
    again()
    assert built.loaded == ["own", "own"]


def test_the_folder_is_anothers(built, monkeypatch):
    build.library()
    planted(built.folder)
    monkeypatch.setattr(build.os, "geteuid", lambda: built.folder.stat().st_uid + 1)
    build.library.cache_clear()
    said = f"{built.folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own"
    assert build.unavailable_reason() == said
    assert built.loaded == ["own"]
