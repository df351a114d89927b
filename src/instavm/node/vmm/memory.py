"""A template's guest memory as a sealed file in memory, from which any number of VMMs map their own copy-on-write.

QEMU opens the file behind guest memory for reading and writing even where it maps it privately. On a file on disk that would
let a VMM that was broken into write into every sandbox of its template. A sealed memfd opens either way, and nobody can
write to it, resize it or unseal it, not even its owner.

With huge pages it lies in the kernel's pool of those. Who maps it reserves a page for each of its own:
all may be written to.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Final

from instavm.errors import HostNotReady, NoCapacity

NAME = "guest memory"
"""Of the file, as /proc/PID/maps shows it (behind `/memfd:`) where it is mapped."""
KEPT = 8
"""Templates whose memory is kept ready; the least recently used one goes first. What runs on it keeps it all the same."""
GROWN_MAX = 256 << 20
"""Bytes by which a copy may grow. A page that nobody had written takes memory once somebody touches it, and keeps it for as
long as the copy is there; one that has grown by more is left to those who run on it, and the next gets a new one."""
HUGE_PAGE: Final = 2 << 20
HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_MORE: Final = "raise vm.nr_hugepages, or set INSTAVM_HUGE_PAGES=off"


class Memories:
    """Owns the descriptors. Costs as much of the host's memory as is written in each file."""

    def __init__(self, *, huge_pages: bool = False) -> None:
        self._huge = huge_pages
        self._made: OrderedDict[tuple[int, int, int], tuple[int, int]] = OrderedDict()
        """File → descriptor of its copy, and what that took when it was new, in bytes."""
        self._one_at_a_time = threading.Lock()

    def get(self, file: Path) -> int:
        """A descriptor of its own for the caller, who closes it.

        Raises: OSError; NoCapacity, HostNotReady when there are too few huge pages to map it.
        """
        with self._one_at_a_time:
            about = file.stat()
            in_huge = self._huge and about.st_size % HUGE_PAGE == 0
            key = about.st_dev, about.st_ino, about.st_mtime_ns
            if key in self._made and _taken(self._made[key][0]) > self._made[key][1] + GROWN_MAX:
                os.close(self._made.pop(key)[0])
            if key not in self._made:
                copy = sealed(file, in_huge=in_huge)
                self._made[key] = copy, _taken(copy)
            self._made.move_to_end(key)
            while len(self._made) > KEPT:
                os.close(self._made.popitem(last=False)[1][0])
            if in_huge:
                _require_huge(about.st_size)
            return os.dup(self._made[key][0])

    def close(self) -> None:
        with self._one_at_a_time:
            while self._made:
                os.close(self._made.popitem()[1][0])


def sealed(file: Path, *, in_huge: bool = False) -> int:
    """A copy of a sparse file that can't be changed any more, as a descriptor.

    in_huge: pages of 2 MiB out of the kernel's pool. Raises OSError; HostNotReady when the pool is too small for it.
    """
    if in_huge and not huge("nr"):
        raise HostNotReady(f"this host has no huge pages of 2 MiB: {_MORE}")
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(source).st_size
        kind = os.MFD_HUGETLB | os.MFD_HUGE_2MB if in_huge else 0
        copy = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | kind)
        try:
            os.ftruncate(copy, size)
            at = 0
            while (at := _data(source, at, size)) < size:
                end = os.lseek(source, at, os.SEEK_HOLE)
                (_copy_huge if in_huge else _copy)(source, copy, at, end)
                at = end
            fcntl.fcntl(copy, fcntl.F_ADD_SEALS, SEALS)
        except BaseException:
            os.close(copy)
            raise
        return copy
    finally:
        os.close(source)


def _copy(source: int, copy: int, at: int, end: int) -> None:
    os.lseek(copy, at, os.SEEK_SET)
    while at < end:
        at += os.sendfile(copy, source, at, end - at)


def _copy_huge(source: int, copy: int, at: int, end: int) -> None:
    """Such a file can only be written through a mapping."""
    first, last = at // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE
    try:
        os.posix_fallocate(copy, first, last - first)  # a page that was missing when it is written to would be a SIGBUS
    except OSError as exc:
        raise HostNotReady(f"a template does not fit into this host's huge pages ({huge('nr')}): {_MORE}") from exc
    with mmap.mmap(copy, last - first, mmap.MAP_SHARED, offset=first) as mapped, memoryview(mapped) as view:
        while at < end:
            with view[at - first : end - first] as rest:
                at += os.preadv(source, [rest], at)


def huge(what: str) -> int:
    """Of huge pages: `nr`, all; `free`; `resv`, those of the free ones that are promised."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without them
        return int((HUGE_PAGES / f"{what}_hugepages").read_text())
    return 0


def _require_huge(size: int) -> None:
    wanted, there = size // HUGE_PAGE, huge("free") - huge("resv")
    if wanted > huge("nr"):
        raise HostNotReady(f"a sandbox takes {wanted} huge pages of 2 MiB, this host has {huge('nr')}: {_MORE}")
    if wanted > there:
        raise NoCapacity(f"a sandbox takes {wanted} huge pages of 2 MiB, {max(there, 0)} are free: {_MORE}")


def _taken(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def _data(fd: int, at: int, size: int) -> int:
    """Where the next byte that was written lies; `size` when there is none."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError:
        return size
