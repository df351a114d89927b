"""The initramfs: busybox, the modules a guest needs to find its disks and its agent's channel, and `init`."""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from instavm.errors import HostNotReady
from instavm.node.images.cpio import Cpio

MODULES: Final = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "squashfs",
    "ext4",
    "overlay",
)
_APPLETS: Final = ("cat", "echo", "insmod", "mount", "poweroff", "reboot", "sh", "sleep", "switch_root")
_FOLDERS: Final = ("bin", "dev", "lib", "lib/modules", "proc", "root", "sys", "user")


def build(busybox: bytes, init: bytes, modules_dir: Path) -> bytes:
    """An uncompressed cpio archive: unpacking it costs the emulated guest less than decompressing would.

    modules_dir: `/lib/modules/VERSION` with depmod's files. Raises: HostNotReady when a module is missing.
    """
    cpio = Cpio()
    for folder in _FOLDERS:
        cpio.directory(folder)
    cpio.console()
    cpio.file("init", init, 0o755)
    cpio.file("bin/busybox", busybox, 0o755)
    for applet in _APPLETS:
        cpio.symlink(f"bin/{applet}", "busybox")
    loaded = []
    for relative in load_order(modules_dir, MODULES):
        name = Path(relative).name.partition(".ko")[0]
        cpio.file(f"lib/modules/{name}.ko", _module(modules_dir / relative))
        loaded.append(f"/lib/modules/{name}.ko\n")
    cpio.file("modules", "".join(loaded).encode())
    return cpio.finish()


def load_order(modules_dir: Path, wanted: Iterable[str]) -> list[str]:
    """Files below `modules_dir` for these modules and all they depend on, each after what it depends on.

    What is built into the kernel is left out. Raises: HostNotReady for a module that is neither.
    """
    needs = _dependencies((modules_dir / "modules.dep").read_text())
    by_name = {_name(path): path for path in needs}
    built_in = {_name(path) for path in (modules_dir / "modules.builtin").read_text().split()}
    order: list[str] = []

    def add(path: str) -> None:
        for dependency in needs[path]:
            add(dependency)
        if path not in order:
            order.append(path)

    for module in wanted:
        if module in by_name:
            add(by_name[module])
        elif module not in built_in:
            raise HostNotReady(f"kernel {modules_dir.name} has no module {module}")
    return order


def _dependencies(text: str) -> Mapping[str, list[str]]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {path: rest.split() for path, _, rest in pairs}


def _name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def _module(path: Path) -> bytes:
    body = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(body)
    if path.suffix != ".ko":
        raise HostNotReady(f"{path.name}: this compression of modules is not known")
    return body
