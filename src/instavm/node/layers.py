"""Layers of disks: files that nobody writes to any more, shared by all whose disks stand on them.

A layer lies in one folder under its own name, which is what overlays on it say. Whoever needs it (a machine, a snapshot,
a template) has a hard link to it in a folder `layers` of its own. So the kernel counts who needs it, whatever is killed,
and a layer with no other link is nobody's.
"""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path
from typing import Final

LINKS: Final = "layers"
DEEP: Final = 4
"""A machine on more layers than this merges them when it has time: each is one more look-up for every block that is read."""
_BACKING: Final = struct.Struct(">8xQI")
"""Of a qcow2 header: where the name of the file below begins, and how long it is."""
_NAME_MAX: Final = 1023


class Layers:
    def __init__(self, state_dir: Path) -> None:
        self.folder = state_dir / "layers"

    def path(self, layer: str) -> Path:
        return self.folder / layer

    def link(self, file: Path, layer: str, owner: Path) -> None:
        """Give a disk the name by which overlays on it know it; `owner` stands on it from now on. Raises OSError."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (owner / LINKS).mkdir(mode=0o700, exist_ok=True)
        os.link(file, owner / LINKS / layer)
        os.link(file, self.path(layer))

    def shared(self, layer: str, owner: Path) -> bool:
        """Let `owner` stand on a layer that there may be. Returns: whether there is. Raises OSError."""
        (owner / LINKS).mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.link(self.path(layer), owner / LINKS / layer)
        except FileNotFoundError:
            return False
        return True

    def share(self, owner: Path, other: Path) -> None:
        """Everything that `owner` stands on, `other` stands on too. Raises OSError."""
        (other / LINKS).mkdir(mode=0o700, exist_ok=True)
        for layer in held(owner):
            os.link(self.path(layer), other / LINKS / layer)

    def sweep(self) -> list[str]:
        """Remove the layers that nobody stands on; their names."""
        gone = []
        for file in self.folder.iterdir() if self.folder.is_dir() else ():
            if file.stat().st_nlink == 1:
                file.unlink()
                gone.append(file.name)
        return gone

    def unheld(self) -> list[str]:
        """What `sweep` would remove."""
        files = self.folder.iterdir() if self.folder.is_dir() else ()
        return [file.name for file in files if file.stat().st_nlink == 1]


def held(owner: Path) -> frozenset[str]:
    """The layers that a machine, a snapshot or a template stands on."""
    folder = owner / LINKS
    return frozenset(link.name for link in folder.iterdir()) if folder.is_dir() else frozenset()


def overlay(blank: Path, backing: Path, target: Path) -> None:
    """Write an empty overlay on `backing` (qcow2): `blank`, which is one on something else, with another name in its header.

    Raises OSError.
    """
    name = os.fsencode(backing)
    if len(name) > _NAME_MAX:
        raise OSError(f"{backing}: too long a path for a disk's header")
    shutil.copyfile(blank, target)
    target.chmod(0o600)
    with target.open("r+b") as file:
        offset, _ = _BACKING.unpack(file.read(_BACKING.size))
        file.seek(offset)
        file.write(name)
        file.seek(0)
        file.write(_header(blank, offset, len(name)))


def _header(blank: Path, offset: int, length: int) -> bytes:
    with blank.open("rb") as file:
        return file.read(8) + struct.pack(">QI", offset, length)
