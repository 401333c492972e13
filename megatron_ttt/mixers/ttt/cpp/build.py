"""Compile the C++ scan where it is first wanted, and load it.

The library is kept in the user's cache folder under a name made of its source, the compiler and the
processor that the compiler builds for, so a change of any makes another. What is loaded runs as
this user, so nothing is that another could have put there.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "scan.cpp"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC"]


class CannotBuild(Exception):
    """Why there is no library here, in one line."""


@cache
def library() -> ctypes.CDLL:
    """The compiled scan. The compiler is $CXX, c++ or g++.

    Raises:
        CannotBuild: no compiler, or none that takes the sources, or no folder of this user's to
            keep the library in.
    """
    compiler = shlex.split(os.environ.get("CXX", ""))
    compiler = compiler or [path for path in map(shutil.which, ("c++", "g++")) if path][:1]
    if not compiler:
        raise CannotBuild("there is no C++ compiler: install g++ or clang++, or set CXX")
    try:
        # What -march=native stands for is in the compiler's own command line.
        target = run(*compiler, *FLAGS, "-###", "-E", "-x", "c++", os.devnull)
        sources = (SOURCE, *sorted(SOURCE.parent.glob("*.h")))
        key = "\0".join((target, *FLAGS, *(source.read_text() for source in sources)))
        folder = private(cache_folder())
        path = folder / f"scan-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not (path.is_file() and is_own(path) and is_private(path)):
            build(compiler, path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:  # of files; of a user without a home
        raise CannotBuild(str(error)) from None
    loaded.kept_size.restype = ctypes.c_int64
    loaded.forward.restype = loaded.backward.restype = None
    return loaded


@cache
def unavailable_reason() -> str | None:
    """What keeps `library` from being there; None if nothing does."""
    try:
        library()
    except CannotBuild as reason:
        return str(reason)
    return None


def cache_folder() -> Path:
    """Of this user, for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-ttt"


def private(folder: Path) -> Path:
    """The folder, there now, which this user alone may write to. What lay in it while others could
    is removed.

    Raises:
        CannotBuild: it belongs to another user.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(folder):
        raise CannotBuild(
            f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own"
        )
    if not is_private(folder):
        folder.chmod(0o700)
        for path in folder.glob("*.so"):
            path.unlink(missing_ok=True)
    return folder


def is_own(path: Path) -> bool:
    return path.stat().st_uid == os.geteuid()


def is_private(path: Path) -> bool:
    """Whether nobody but its owner may write to it."""
    return not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def build(compiler: list[str], path: Path) -> None:
    """Processes that are at it together each compile their own; the last one's stays."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        run(*compiler, *FLAGS, "-o", str(made), str(SOURCE))
        made.chmod(0o700)  # whatever the umask
        made.replace(path)


def run(*command: str) -> str:
    """What a compiler says."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise CannotBuild(f"{command[0]} cannot build it: {said[0].strip()}")
    return done.stderr
