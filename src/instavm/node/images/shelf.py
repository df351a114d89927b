"""A folder of finished builds, each under its key. A build is there completely or not at all.

Builds are made beside their final place and renamed into it. One lock per shelf: a second builder waits and
then finds the first one's result. The lock dies with its holders, so whoever gets it may remove everything
unfinished.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from instavm.errors import DiskFull, HostNotReady
from instavm.node.images.workshop import Progress, Workshop, silent

LOCK_DEADLINE_S: Final = 3600.0
"""How long one builder waits for another."""
_POLL_S: Final = 0.1
_UNFINISHED: Final = ".building-"

Make = Callable[[Workshop], None]
"""Fills the workshop's folder. It becomes the result when this returns, and is removed when it raises."""


class Shelf:
    """Builds of one kind. `find` never blocks; `ensure` builds what is missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> Path | None:
        """The finished build's folder, or None."""
        place = self._folder / key
        return place if place.is_dir() else None

    def ensure(self, key: str, make: Make, *, needs_bytes: int, progress: Progress = silent) -> Path:
        """The build's folder, made first if it isn't there.

        needs_bytes: free space without which the build isn't even tried.
        Raises: DiskFull; HostNotReady when another builder doesn't finish in time; whatever `make` raises.
        """
        if found := self.find(key):
            return found
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder / ".lock", progress) as lock_fd:
                self._sweep()
                return self.find(key) or self._build(key, make, needs_bytes, lock_fd, progress)
        except PermissionError as exc:
            raise HostNotReady(f"{self._folder} cannot be written by this user: {exc}") from exc
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(f"no space left below {self._folder}") from exc
            raise

    def prune(self, keep: int, min_age_s: float) -> None:
        """Remove all but the `keep` builds that `touch` saw last, sparing those it saw within `min_age_s`."""
        with _locked(self._folder / ".lock", silent):
            builds = [path for path in self._folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
            builds.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for old in builds[keep:]:
                if time.time() - old.stat().st_mtime > min_age_s:
                    doomed = old.with_name(_UNFINISHED + old.name)
                    old.rename(doomed)
                    shutil.rmtree(doomed)

    def touch(self, key: str) -> None:
        """Note that this build is in use; a read-only cache is fine."""
        try:
            os.utime(self._folder / key)
        except OSError as exc:
            if exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise

    def _build(self, key: str, make: Make, needs_bytes: int, lock_fd: int, progress: Progress) -> Path:
        free = shutil.disk_usage(self._folder).free
        if free < needs_bytes:
            raise DiskFull(
                f"{self._folder} has {free >> 20} MiB free, this build needs {needs_bytes >> 20} MiB; "
                "free some space or set INSTAVM_CACHE_DIR to a larger disk"
            )
        unfinished = self._folder / f"{_UNFINISHED}{key}"
        unfinished.mkdir(mode=0o755)
        try:
            make(Workshop(unfinished, lock_fd, progress))
            _readable(unfinished)
            subprocess.run(["sync", "--file-system", str(unfinished)], check=False, timeout=600)
            unfinished.rename(self._folder / key)
        except BaseException:
            self._sweep()
            raise
        return self._folder / key

    def _sweep(self) -> None:
        """Remove what killed builders left. Only with the lock."""
        for left in self._folder.glob(f"{_UNFINISHED}*"):
            remove_tree(left)


def _readable(folder: Path) -> None:
    """Whatever the builder's umask: the files of a build are for all to read, a VMM's own user among them."""
    for path in (folder.parent, folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else path.stat().st_mode & 0o555 | 0o444)


def remove_tree(root: Path) -> None:
    """Remove a build's tree after unmounting whatever is still mounted in it.

    Raises: HostNotReady when something stays mounted: what a mount shows is not ours to delete.
    """
    for mount in sorted(_mounts_below(root), reverse=True):
        subprocess.run(["umount", "--lazy", "--no-canonicalize", mount], check=False, capture_output=True, timeout=60)
    if stuck := _mounts_below(root):
        raise HostNotReady(f"{stuck[0]} is still mounted, so {root} is not removed; unmount it and try again")
    shutil.rmtree(root)


def _mounts_below(root: Path) -> list[str]:
    prefix = f"{root.resolve()}/"
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    points = [line.split(" ")[4].encode().decode("unicode_escape") for line in lines]
    return [point for point in points if point.startswith(prefix)]


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[int]:
    """Hold the lock file exclusively; yields its descriptor. Raises: HostNotReady after LOCK_DEADLINE_S."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + LOCK_DEADLINE_S
        told = False
        while not _try_lock(fd):
            if not told:
                progress("waiting for another build to finish")
                told = True
            if time.monotonic() > deadline:
                raise HostNotReady(f"another build has held {path} for {LOCK_DEADLINE_S:.0f} s; is it stuck?")
            time.sleep(_POLL_S)
        yield fd
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
