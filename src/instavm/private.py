"""Files that hold a key: there whole or not at all, and nobody else's to read."""

from __future__ import annotations

import os
from pathlib import Path


def write_key(path: Path, data: bytes) -> None:
    """Mode 0600, on disk when it returns. Whoever is killed half-way leaves none. Raises OSError."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    new.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
