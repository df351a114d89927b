"""Wheels that carry whole programs, fetched once, by hash, and kept under the cache folder."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from instavm.settings import Settings


class Wheel(NamedTuple):
    """One file of the Python package registry. `requirement`: `name==version`."""

    requirement: str
    sha256: str


def unpacked(name: str, wheel: Wheel, unpack: Callable[[Path, Path], None]) -> Path:
    """What `unpack(wheel, place)` has made of it: done once for all runs that share a cache, under a lock."""
    home = Settings().cache_dir / "tests" / name
    home.mkdir(parents=True, exist_ok=True)
    made = home / wheel.sha256[:16]
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=home) as folder, fetched(wheel, Path(folder)) as file:
                (new := Path(folder) / "new").mkdir()
                unpack(file, new)
                new.rename(made)
    return made


@contextmanager
def fetched(wheel: Wheel, folder: Path) -> Iterator[Path]:
    """The wheel as a file; pip refuses another one than that with this hash."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--require-hashes", "--dest", folder, "--requirement", wanted], check=True)
    (file,) = folder.glob("*.whl")
    yield file
