"""Snapshots on disk: the disk of a sandbox, or all of it at rest, each in a folder that is there whole or not at all.

What a folder holds is described and checked by `snapshot.json`: SHA-256 of every file that the snapshot stands on, and what
it can be brought back on. It is made under a name that nobody looks for and renamed once everything is on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from instavm.errors import BootFailed, CorruptSnapshot, DiskFull, SnapshotError
from instavm.node.images.rootfs import Image
from instavm.node.layers import Layers, held
from instavm.node.sparse import digest
from instavm_guest.frames import PROTOCOL

FORMAT: Final = 1
DESCRIPTION: Final = "snapshot.json"
STATE: Final = "state"
CHANGES: Final = "changes"
FULL_BYTES: Final = 1 << 20
PIN: Final = "template.json"
"""A hard link to the description of the template that is stood on: while there is one, the template is in use."""
BELOW: Final = "below.json"
"""The same, of what the image of a template stands on."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """kind `disk`: an image of its own, booted like any other. kind `memory`: a sandbox at rest, which goes on where it was."""

    kind: Literal["disk", "memory"]
    disk: str
    """The layer that is the disk."""
    disk_format: str
    size_bytes: int
    """Of the disk, as the guest sees it."""
    env: Mapping[str, str]
    workdir: str
    image: str
    vcpus: int
    memory_mib: int
    sha256: Mapping[str, str]
    """Of every layer, and of the saved state."""
    template: str = ""
    """The key of what its memory differs from, or what its disk has been written on top of."""
    template_digest: str = ""
    vmm: str = ""
    """The VMM, how it runs guests, and the processor that it shows them."""
    cpu: str = ""
    """The processor as `Driver.processor` tells it."""
    guest: str = ""
    """Digest of kernel, initramfs and agent."""
    system: str = ""
    protocol: int = PROTOCOL
    labels: Mapping[str, str] = field(default_factory=dict)
    made_at: str = ""
    format: int = FORMAT


class Snapshots:
    def __init__(self, state_dir: Path, layers: Layers) -> None:
        self.folder = state_dir / "snapshots"
        self._layers = layers
        self._checked: dict[str, tuple[tuple[int, int, int], str]] = {}

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """A folder to fill; it goes unless `seal` made it a snapshot. Raises DiskFull."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = self.folder / f".{name}-{secrets.token_hex(4)}"
        try:
            with told_when_full(self.folder):
                folder.mkdir(mode=0o700)
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def seal(self, folder: Path, name: str, about: Manifest) -> None:
        """Blocking. What `making` gave becomes the snapshot `name`, in place of one that was there. Raises OSError, DiskFull."""
        with told_when_full(self.folder):
            files = {layer: self._layers.path(layer) for layer in sorted(held(folder))}
            files |= {one: folder / one for one in (STATE, CHANGES) if (folder / one).exists()}
            for file in files.values():
                _to_disk(file)
            digests = {one: self._digest(file) for one, file in files.items()}
            made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            told = asdict(about) | {"sha256": digests, "made_at": made_at}
            (folder / DESCRIPTION).write_text(json.dumps({**told, "seal": _seal(told)}, indent=1))
            _to_disk(folder / DESCRIPTION)
            final = self.folder / name
            self.remove(name)
            folder.rename(final)
            _to_disk(self.folder)

    def read(self, name: str) -> Manifest:
        """The description alone, checked against its own seal. Raises SnapshotError (there is none), CorruptSnapshot."""
        try:
            told = json.loads((self.folder / name / DESCRIPTION).read_text())
            if told.pop("seal") != _seal(told) or told["format"] != FORMAT:
                raise CorruptSnapshot(f"snapshot {name}: its description was altered, or is of another version")
            return Manifest(**told)
        except FileNotFoundError:
            raise SnapshotError(f"snapshot {name} is not on this host") from None
        except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as exc:
            raise CorruptSnapshot(f"snapshot {name}: its description can't be read: {exc}") from exc

    def verify(self, name: str, about: Manifest) -> None:
        """Blocking. Raises CorruptSnapshot: a file of it is missing, or is not what was saved."""
        folder = self.folder / name
        wanted = {about.disk, *((STATE, CHANGES) if about.kind == "memory" else ()), *held(folder)}
        if wanted != set(about.sha256):
            raise CorruptSnapshot(f"snapshot {name}: files of it are missing, or are of another one")
        for one, recorded in about.sha256.items():
            file = folder / one if one in (STATE, CHANGES) else self._layers.path(one)
            try:
                found = self._digest(file)
            except OSError as exc:
                raise CorruptSnapshot(f"snapshot {name}: {one} can't be read: {exc.strerror}") from exc
            if found != recorded:
                raise CorruptSnapshot(f"snapshot {name}: {one} is not what was saved")

    def image(self, name: str) -> Image:
        """A disk snapshot as an image to boot. Blocking. Raises SnapshotError, CorruptSnapshot."""
        about = self.read(name)
        if about.kind != "disk":
            raise SnapshotError(f"snapshot {name} is a sandbox at rest, not a disk")
        self.verify(name, about)
        rootfs = self._layers.path(about.disk)
        used = rootfs.stat().st_blocks * 512
        return Image(
            name,
            _mark(about),
            rootfs,
            about.env,
            about.workdir,
            about.size_bytes,
            used,
            about.disk_format,
            self.folder / name,
        )

    def remove(self, name: str) -> None:
        """Of one that is not there nothing is said. Its layers go with the next sweep, unless others stand on them."""
        with suppress(FileNotFoundError):
            gone = self.folder / f".gone-{secrets.token_hex(6)}"
            (self.folder / name).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def images(self) -> dict[str, str]:
        """The disk snapshots there are, and the digests of what they are now."""
        found = {}
        for name in self.names():
            with suppress(SnapshotError, CorruptSnapshot):
                about = self.read(name)
                if about.kind == "disk":
                    found[name] = _mark(about)
        return found

    def names(self) -> list[str]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return [one.name for one in found if not one.name.startswith(".")]

    def sweep(self) -> None:
        """Remove what was being made or removed when a server was killed. Only at start."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

    def sizes(self, name: str) -> tuple[int, int]:
        """Bytes on the host's disk: of this snapshot alone, and of layers that others stand on too."""
        folder, own, shared = self.folder / name, 0, 0
        for file in (STATE, CHANGES, DESCRIPTION):
            with suppress(FileNotFoundError):
                own += (folder / file).stat().st_blocks * 512
        for layer in held(folder):
            with suppress(FileNotFoundError):
                status = self._layers.path(layer).stat()
                if status.st_nlink > 2:
                    shared += status.st_blocks * 512
                else:
                    own += status.st_blocks * 512
        return own, shared

    def _digest(self, file: Path) -> str:
        """Of a layer that was looked at before and has not been touched since, from memory."""
        status = file.stat()
        mark = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._checked.get(file.name) if file.parent == self._layers.folder else None
        if known is not None and known[0] == mark:
            return known[1]
        found = digest(file)
        if file.parent == self._layers.folder:
            self._checked[file.name] = (mark, found)
        return found


def pin(template: Path, owner: Path, name: str = PIN) -> None:
    """Note that `owner` stands on the template in that folder. Where links can't reach, nothing removes templates either."""
    with suppress(OSError):
        os.link(template / PIN, owner / name)


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Raises DiskFull for what went wrong because the disk of `folder` is full; a VMM only says that it could not write."""
    try:
        yield
    except (OSError, BootFailed) as exc:
        full = isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or (isinstance(exc, BootFailed) and shutil.disk_usage(folder).free < FULL_BYTES):
            raise DiskFull(f"{folder}: no space left on the host's disk for a snapshot") from exc
        raise


def _mark(about: Manifest) -> str:
    told = json.dumps([dict(about.sha256), dict(about.env), about.workdir], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _seal(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
