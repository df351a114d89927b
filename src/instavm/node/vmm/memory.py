"""A template's guest memory as a sealed file in memory, from which any number of VMMs map their own copy-on-write.

QEMU opens the file behind guest memory for reading and writing even where it maps it privately. On a file on disk that would
let a VMM that was broken into write into every sandbox of its template. A sealed memfd opens either way, and nobody can
write to it, resize it or unseal it, not even its owner.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import OrderedDict
from pathlib import Path

NAME = "guest memory"
"""Of the file, as /proc/PID/maps shows it (behind `/memfd:`) where it is mapped."""
KEPT = 8
"""Templates whose memory is kept ready; the least recently used one goes first. What runs on it keeps it all the same."""
GROWN_MAX = 256 << 20
"""Bytes by which a copy may grow. A page that nobody had written takes memory once somebody touches it, and keeps it for as
long as the copy is there; one that has grown by more is left to those who run on it, and the next gets a new one."""
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class Memories:
    """Owns the descriptors. Costs as much of the host's memory as is written in each file."""

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[int, int, int], tuple[int, int]] = OrderedDict()
        """File → descriptor of its copy, and what that took when it was new, in bytes."""
        self._one_at_a_time = threading.Lock()

    def get(self, file: Path) -> int:
        """A descriptor of its own for the caller, who closes it. Raises OSError."""
        with self._one_at_a_time:
            about = file.stat()
            key = about.st_dev, about.st_ino, about.st_mtime_ns
            if key in self._made and _taken(self._made[key][0]) > self._made[key][1] + GROWN_MAX:
                os.close(self._made.pop(key)[0])
            if key not in self._made:
                copy = sealed(file)
                self._made[key] = copy, _taken(copy)
            self._made.move_to_end(key)
            while len(self._made) > KEPT:
                os.close(self._made.popitem(last=False)[1][0])
            return os.dup(self._made[key][0])

    def close(self) -> None:
        with self._one_at_a_time:
            while self._made:
                os.close(self._made.popitem()[1][0])


def sealed(file: Path) -> int:
    """A copy of a sparse file that can't be changed any more, as a descriptor."""
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        copy = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(copy, size)
            at = 0
            while (at := _data(source, at, size)) < size:
                end = os.lseek(source, at, os.SEEK_HOLE)
                os.lseek(copy, at, os.SEEK_SET)
                while at < end:
                    at += os.sendfile(copy, source, at, end - at)
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(copy)
            raise
        return copy
    finally:
        os.close(source)


def _taken(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def _data(fd: int, at: int, size: int) -> int:
    """Where the next byte that was written lies; `size` when there is none."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        return size
