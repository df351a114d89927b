"""What the rest of the node asks for: the guest's base and the images, built when they aren't there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instavm.node.images import kernel, rootfs, system
from instavm.node.images.kernel import Kernel
from instavm.node.images.rootfs import Image
from instavm.node.images.shelf import Shelf
from instavm.node.images.workshop import Progress, check_host, silent

__all__ = ["GuestBase", "Image", "ImageStore"]

_GUESTS_KEPT: Final = 4
_GUEST_MIN_AGE_S: Final = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class GuestBase:
    """What every guest boots from, whatever its image.

    kernel: bzImage, for QEMU. vmlinux: the same as ELF, for Firecracker. system: read-only disk (squashfs).
    digest: sha256, as hex, over the contents of kernel, initrd and system.
    """

    kernel: Path
    vmlinux: Path
    initrd: Path
    system: Path
    digest: str


class ImageStore:
    """Blocking; call it from a thread. Safe to use from several processes at once.

    Older builds of the guest's base are removed once they haven't been used for hours: who needs one longer
    (a saved memory image does) makes hard links of its files.
    """

    def __init__(self, cache_dir: Path, disk_gib: int) -> None:
        self._disk_gib = disk_gib
        self._kernels = Shelf(cache_dir / "kernels")
        self._bases = Shelf(cache_dir / "bases")
        self._guests = Shelf(cache_dir / "guests")
        self._images = Shelf(cache_dir / "images")

    def ensure_kernel(self, progress: Progress = silent) -> Kernel:
        """Raises: HostNotReady, DiskFull."""
        if found := kernel.find_kernel(self._kernels):
            return found
        check_host()
        return kernel.ensure_kernel(self._kernels, progress)

    def ensure_guest(self, progress: Progress = silent) -> GuestBase:
        """Raises: HostNotReady, DiskFull."""
        if found := self.find_guest():
            self._guests.touch(system.guest_key())
            return found
        check_host()
        of = self.ensure_kernel(progress)
        base = system.ensure_base(self._bases, of, progress)
        folder = system.ensure_guest(self._guests, base, of, progress)
        self._guests.prune(_GUESTS_KEPT, _GUEST_MIN_AGE_S)
        return _guest(of, folder)

    def find_guest(self) -> GuestBase | None:
        """What is there for the agent's present source, without building; None if something is missing."""
        of, folder = kernel.find_kernel(self._kernels), self._guests.find(system.guest_key())
        return _guest(of, folder) if of and folder else None

    def ensure_default(self, progress: Progress = silent) -> Image:
        """The default image. Takes some minutes the first time. Raises: HostNotReady, DiskFull."""
        if found := self.find(rootfs.DEFAULT):
            return found
        check_host()
        return rootfs.ensure_image(self._images, rootfs.DEFAULT, self._disk_gib, progress)

    def find(self, name: str) -> Image | None:
        """The image of this name if it is there, without building."""
        return rootfs.find_image(self._images, name, self._disk_gib) if name == rootfs.DEFAULT else None


def _guest(of: Kernel, folder: Path) -> GuestBase:
    initrd, squashfs = folder / system.INITRD, folder / system.SYSTEM
    digest = json.loads((folder / system.DESCRIPTION).read_text())["digest"]
    return GuestBase(of.bzimage, of.vmlinux, initrd, squashfs, digest)
