"""Debian's cloud kernel, unpacked from its package and never installed on the host."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instavm.errors import HostNotReady
from instavm.node.images import archive, recipes
from instavm.node.images.shelf import Shelf
from instavm.node.images.workshop import Progress, Workshop, silent

PACKAGE: Final = "linux-image-cloud-amd64"
_BUILDER: Final = 1
"""Raised whenever the code below makes something else of the same package."""
_NEEDS_BYTES: Final = 600 << 20

_COMPRESSIONS: Final = {
    b"\x02\x21\x4c\x18": "lz4",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"\x1f\x8b": "gzip",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """version: as in `uname -r`. modules_dir: `/lib/modules/VERSION` as packaged, without depmod's files."""

    version: str
    bzimage: Path
    vmlinux: Path
    modules_dir: Path


def kernel_key() -> str:
    """The name of the build for this host's Debian release."""
    return recipes.key({"builder": _BUILDER, "suite": archive.suite(), "package": PACKAGE})


def ensure_kernel(shelf: Shelf, progress: Progress = silent) -> Kernel:
    """Download and unpack the kernel, unless that has been done.

    Raises: HostNotReady, DiskFull.
    """
    return _at(shelf.ensure(kernel_key(), _make, needs_bytes=_NEEDS_BYTES, progress=progress))


def find_kernel(shelf: Shelf) -> Kernel | None:
    """The kernel if it has been unpacked."""
    folder = shelf.find(kernel_key())
    return _at(folder) if folder else None


def extract_vmlinux(bzimage: bytes, work: Workshop) -> bytes:
    """The ELF image inside a bzImage: Firecracker boots only that.

    The header's fields are those of Documentation/arch/x86/boot.rst of the kernel.
    Raises: HostNotReady when the file isn't a bzImage or its compression isn't known.
    """
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        raise HostNotReady("the kernel is not a bzImage")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    vmlinux = _decompress(payload, work)
    if vmlinux[:4] != b"\x7fELF":
        raise HostNotReady("the kernel's payload is not an ELF image")
    return vmlinux


def _decompress(payload: bytes, work: Workshop) -> bytes:
    name = next((name for magic, name in _COMPRESSIONS.items() if payload.startswith(magic)), None)
    if name == "gzip":
        return gzip.decompress(payload)
    body = payload[:-4]  # the kernel's build appends the uncompressed size
    if name == "xz":
        return lzma.decompress(body)
    if name is None:
        raise HostNotReady(f"the kernel is compressed in an unknown way (starts with {payload[:6].hex()})")
    packed, unpacked = work.folder / "payload.packed", work.folder / "payload.unpacked"
    packed.write_bytes(body)
    output = (unpacked,) if name == "lz4" else ("-o", unpacked)
    work.run(name, "-d", "-q", "-f", packed, *output)
    vmlinux = unpacked.read_bytes()
    packed.unlink()
    unpacked.unlink()
    return vmlinux


def _make(work: Workshop) -> None:
    package = archive.download(work, archive.open_archive(work), PACKAGE)
    work.progress("unpacking the kernel")
    unpacked = work.folder / "package"
    work.run("dpkg-deb", "-x", package, unpacked)
    bzimage = next((unpacked / "boot").glob("vmlinuz-*"))
    modules = next(path for path in (unpacked / "lib/modules", unpacked / "usr/lib/modules") if path.is_dir())
    (work.folder / "vmlinux").write_bytes(extract_vmlinux(bzimage.read_bytes(), work))
    bzimage.rename(work.folder / "bzImage")
    modules.rename(work.folder / "modules")
    for name in ("package", "apt", "apt-download"):
        shutil.rmtree(work.folder / name, ignore_errors=True)


def _at(folder: Path) -> Kernel:
    modules = next((folder / "modules").iterdir())
    return Kernel(modules.name, folder / "bzImage", folder / "vmlinux", modules)
