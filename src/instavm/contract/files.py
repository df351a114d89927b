"""Files in a sandbox."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was written: where it came to lie (absolute), and its bytes."""

    path: str
    size_bytes: int
