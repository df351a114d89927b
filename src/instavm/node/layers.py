"""Layers of disks: files that nobody writes to any more, shared by all whose disks stand on them.

A layer lies in one folder under its own name, which is what overlays on it say. Whoever needs it (a machine, a snapshot,
a template) has a hard link to it in a folder `layers` of its own. So the kernel counts who needs it, whatever is killed,
and a layer with no other link is nobody's.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from instavm.errors import CorruptSnapshot
from instavm.settings import Settings

LINKS: Final = "layers"
DEEP: Final = 4
"""A machine on more layers than this merges them when it has time: each is one more look-up for every block that is read."""
_BACKING: Final = struct.Struct(">8xQI")
"""Of a qcow2 header: where the name of the file below begins, and how long it is."""
_NAME_MAX: Final = 1023
_MAGIC: Final = b"QFI\xfb"
_DEPTH_MAX: Final = 64


class Layers:
    def __init__(self, settings: Settings) -> None:
        self.folder = settings.state_dir / "layers"
        self._templates = (settings.cache_dir / "templates", settings.state_dir / "templates")
        self._images = settings.cache_dir / "images"

    def path(self, layer: str) -> Path:
        return self.folder / layer

    def link(self, file: Path, layer: str, owner: Path) -> None:
        """Give a disk the name by which overlays on it know it; `owner` stands on it from now on.

        Raises OSError; CorruptSnapshot: it is no file, but a link, say, that a VMM put there.
        """
        if not stat.S_ISREG(file.lstat().st_mode):
            raise CorruptSnapshot(f"{file.name} is no file")
        self.folder.mkdir(mode=0o700, exist_ok=True)
        (owner / LINKS).mkdir(mode=0o700, exist_ok=True)
        os.link(file, owner / LINKS / layer, follow_symlinks=False)
        os.link(file, self.path(layer), follow_symlinks=False)

    def close(self, layer: str) -> None:
        """Nobody writes to it any more: it is the server's, and no VMM's uid may open it. Raises OSError."""
        os.chown(self.path(layer), os.geteuid(), os.getegid())
        self.path(layer).chmod(0o400)

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

    def under(self, disk: Path, *owners: Path) -> tuple[Path, ...]:
        """The files that a disk of one of `owners` stands on, nearest first: their layers, disks of templates, images.

        The names are read from headers, which VMMs have written. Raises CorruptSnapshot: one is none of those.
        """
        layers = set[str]().union(*(held(owner) for owner in owners))

        def allowed(file: Path) -> bool:
            if file.parent == self.folder:
                return file.name in layers
            if file.name == "disk.qcow2" and file.parent.parent in self._templates:
                layers.update(held(file.parent))  # what a template stands on, those stand on who stand on it
                return True
            return file.is_relative_to(self._images)

        return below(disk, allowed)

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


def below(disk: Path, allowed: Callable[[Path], bool]) -> tuple[Path, ...]:
    """The files that a disk stands on, nearest first, as their headers say.

    A header is what a VMM has written, so each name in it must be one that is `allowed`. Raises CorruptSnapshot.
    """
    found: list[Path] = []
    while (backing := _backing(found[-1] if found else disk)) is not None:
        if len(found) == _DEPTH_MAX or os.path.normpath(backing) != str(backing) or not allowed(backing):
            raise CorruptSnapshot(f"{disk.name} stands on what it may not stand on")
        found.append(backing)
    return tuple(found)


def _backing(disk: Path) -> Path | None:
    """What a qcow2 names in its header; None for one that stands on nothing, and for a plain image."""
    with disk.open("rb") as file:
        head = file.read(_BACKING.size)
        if len(head) < _BACKING.size or not head.startswith(_MAGIC):
            return None
        offset, length = _BACKING.unpack(head)
        if not offset:
            return None
        file.seek(offset)
        return Path(os.fsdecode(file.read(min(length, _NAME_MAX))))


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
