"""Writes an initramfs archive (cpio "newc"), without root and the same bytes every time.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

import stat
from typing import Final

_CONSOLE: Final = (5, 1)


class Cpio:
    """Entries in the order they are added; parents come before their children."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._entries = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode)

    def file(self, path: str, body: bytes, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, body)

    def symlink(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def console(self) -> None:
        """/dev/console: without it PID 1 starts with no standard output."""
        self._add("dev/console", stat.S_IFCHR | 0o600, device=_CONSOLE)

    def finish(self) -> bytes:
        """The whole archive."""
        self._add("TRAILER!!!", 0)
        body = b"".join(self._parts)
        return body + b"\0" * (-len(body) % 512)

    def _add(self, path: str, mode: int, body: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._entries += 1
        name = path.encode() + b"\0"
        fields = (self._entries, mode, 0, 0, 1, 0, len(body), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._parts += [
            header,
            name,
            b"\0" * (-(len(header) + len(name)) % 4),
            body,
            b"\0" * (-len(body) % 4),
        ]
