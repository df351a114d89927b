"""Sparse files: most of a guest's memory and disk is holes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def digest(path: Path) -> str:
    """SHA-256 over the places and bytes of all that is written in a sparse file, and over its size."""
    total = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        total.update(b"%d" % size)
        for start, end in extents(file.fileno(), size):
            total.update(b"@%d" % start)
            file.seek(start)
            left = end - start
            while left:
                data = file.read(min(1 << 20, left))
                total.update(data)
                left -= len(data)
    return total.hexdigest()


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
