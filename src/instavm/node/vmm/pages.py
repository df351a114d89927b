"""The pages of a VMM's guest memory that are its own: found, copied out and put back, from outside of its process.

A restored machine maps its template's memory copy-on-write, so all that tells it from the template are the pages that it
has written to. This is the one place that looks into another process: it takes the right to ptrace it.

A file of changes: header, data of the pages that hold something, then the index: runs of (first page, pages, has data).
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instavm.errors import BootFailed, CorruptSnapshot
from instavm.node.vmm.memory import NAME

PAGE: Final = 4096
MAGIC: Final = b"IVMPAGE1"
HEADER: Final = struct.Struct("<8sQQQ")
"""Magic, bytes of guest memory, where the index begins, runs in the index."""
RUN: Final = struct.Struct("<QIB3x")
CHUNK_PAGES: Final = 256
SCAN_ENTRIES: Final = 1 << 18
"""Entries of a pagemap read at once: 2 MiB of them tell of 1 GiB."""
_ZERO: Final = bytes(PAGE * CHUNK_PAGES)
# The top byte of a pagemap entry: 0x80 present, 0x40 swapped, 0x20 page of a file. Ours: swapped, or present and of no file.
_OWN: Final = bytes(int(bool(top & 0x40) or (bool(top & 0x80) and not top & 0x20)) for top in range(256))
_RUN_OF_OWN: Final = re.compile(rb"\x01+")


@dataclass(frozen=True, slots=True)
class Area:
    """Where a piece of guest memory lies in the VMM's address space."""

    address: int
    size: int
    offset: int
    """In guest memory, in bytes."""


@dataclass(frozen=True, slots=True)
class Copied:
    pages: int
    data_bytes: int


def save(pid: int, memory: Path, into: int) -> Copied:
    """Write all pages that are the machine's own to the descriptor `into`. Only while it is paused.

    Raises OSError, BootFailed.
    """
    areas = _areas(pid, memory)
    runs: list[tuple[int, int, bool]] = []
    at = HEADER.size
    os.lseek(into, at, os.SEEK_SET)
    source = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for area, first, count in _own_runs(pid, areas):
            for start in range(first, first + count, CHUNK_PAGES):
                pages = min(CHUNK_PAGES, first + count - start)
                data = os.pread(source, pages * PAGE, area.address + start * PAGE)
                if len(data) != pages * PAGE:
                    raise BootFailed(f"guest memory of process {pid} could not be read")
                for where, length, holds in _split(data):
                    _append(runs, area.offset // PAGE + start + where, length, holds)
                    if holds:
                        at += _write(into, memoryview(data)[where * PAGE : (where + length) * PAGE])
    finally:
        os.close(source)
    _write(into, memoryview(b"".join(RUN.pack(first, count, holds) for first, count, holds in runs)))
    size = sum(area.size for area in areas)
    os.pwrite(into, HEADER.pack(MAGIC, size, at, len(runs)), 0)
    return Copied(sum(count for _, count, _ in runs), at - HEADER.size)


def load(pid: int, memory: Path, changes: Path) -> None:
    """Put saved pages into the memory of a machine that has not run yet. Raises CorruptSnapshot, OSError."""
    areas = _areas(pid, memory)
    with changes.open("rb", buffering=0) as file:
        target = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            at = HEADER.size
            for first, count, holds in read_index(file.fileno(), sum(area.size for area in areas)):
                for start in range(first, first + count, CHUNK_PAGES):
                    pages = min(CHUNK_PAGES, first + count - start)
                    data = os.pread(file.fileno(), pages * PAGE, at) if holds else _ZERO[: pages * PAGE]
                    at += len(data) if holds else 0
                    _put(target, areas, start * PAGE, data, pages * PAGE)
        finally:
            os.close(target)


def check(memory: Path, changes: Path) -> None:
    """What `load` would find out, of a machine that maps all of `memory` only later. Raises CorruptSnapshot, OSError."""
    with changes.open("rb", buffering=0) as file:
        read_index(file.fileno(), memory.stat().st_size)


def read_index(fd: int, memory_bytes: int) -> list[tuple[int, int, bool]]:
    """The runs of a file of changes, checked against the size of the memory. Raises CorruptSnapshot."""
    head = os.pread(fd, HEADER.size, 0)
    size = os.fstat(fd).st_size
    if len(head) != HEADER.size:
        raise CorruptSnapshot("the saved memory is cut off")
    magic, saved_bytes, index_at, count = HEADER.unpack(head)
    if magic != MAGIC or saved_bytes != memory_bytes or index_at + count * RUN.size != size:
        raise CorruptSnapshot("the saved memory is not that of such a machine")
    runs = [
        (first, pages, bool(holds)) for first, pages, holds in RUN.iter_unpack(os.pread(fd, size - index_at, index_at))
    ]
    held = sum(pages for _, pages, holds in runs if holds) * PAGE
    if held != index_at - HEADER.size or any((first + pages) * PAGE > memory_bytes for first, pages, _ in runs):
        raise CorruptSnapshot("the saved memory does not fit its own index")
    return runs


def _put(target: int, areas: list[Area], offset: int, data: bytes, size: int) -> None:
    if len(data) != size:
        raise CorruptSnapshot("the saved memory is cut off")
    view = memoryview(data)
    while view:
        area = next(one for one in areas if one.offset <= offset < one.offset + one.size)
        room = min(len(view), area.offset + area.size - offset)
        done = os.pwrite(target, view[:room], area.address + offset - area.offset)
        view, offset = view[done:], offset + done


def _areas(pid: int, memory: Path) -> list[Area]:
    """Known by what they map: `memory` itself, or a copy of it. Raises BootFailed: there is no such mapping."""
    found = []
    about = memory.stat()
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").splitlines():
        places, mode, offset, device, inode, *name = line.split(maxsplit=5)
        major, minor = (int(part, 16) for part in device.split(":"))
        itself = (os.makedev(major, minor), int(inode)) == (about.st_dev, about.st_ino)
        copy = bool(name) and name[0].startswith(f"/memfd:{NAME}")
        if (itself or copy) and mode[0] == "r" and mode[3] == "p":
            begin, end = (int(part, 16) for part in places.split("-"))
            found.append(Area(begin, end - begin, int(offset, 16)))
    if not found or sum(area.size for area in found) != about.st_size:
        raise BootFailed(f"process {pid} does not map {memory} as its guest's memory")
    return found


def _own_runs(pid: int, areas: list[Area]) -> Iterator[tuple[Area, int, int]]:
    """`(area, first page in it, pages)` of all pages that the process has written to."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for area in areas:
            for begin in range(0, area.size // PAGE, SCAN_ENTRIES):
                entries = min(SCAN_ENTRIES, area.size // PAGE - begin)
                told = os.pread(fd, entries * 8, (area.address // PAGE + begin) * 8)
                for run in _RUN_OF_OWN.finditer(told[7::8].translate(_OWN)):
                    yield area, begin + run.start(), run.end() - run.start()
    finally:
        os.close(fd)


def _split(data: bytes) -> Iterator[tuple[int, int, bool]]:
    """Runs of pages that hold something, and of such that are all zero."""
    begin, pages = 0, len(data) // PAGE
    kind = None
    for page in range(pages):
        holds = data.count(0, page * PAGE, (page + 1) * PAGE) != PAGE if data[page * PAGE] == 0 else True
        if kind is not None and holds != kind:
            yield begin, page - begin, kind
            begin = page
        kind = holds
    if kind is not None:
        yield begin, pages - begin, kind


def _append(runs: list[tuple[int, int, bool]], first: int, count: int, holds: bool) -> None:
    """Add a run, or make the last one longer when it goes on there."""
    if runs and runs[-1][2] == holds and runs[-1][0] + runs[-1][1] == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count, holds)
    else:
        runs.append((first, count, holds))


def _write(fd: int, view: memoryview) -> int:
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done


@contextmanager
def created(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
