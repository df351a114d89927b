"""What every guest boots from: kernel, initramfs, system image."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from instavm.errors import HostNotReady
from instavm.node.images import ImageStore, initramfs, recipes, system
from instavm.node.images.cpio import Cpio
from instavm.node.images.kernel import extract_vmlinux
from instavm.node.images.shelf import Shelf


def entries(archive: bytes) -> dict[str, bytes]:
    """Names and bodies in a cpio archive of the "newc" kind."""
    found, at = {}, 0
    while True:
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        start = at + 110 + fields[11] + -(110 + fields[11]) % 4
        if name == "TRAILER!!!":
            return found
        found[name] = archive[start : start + fields[6]]
        at = start + fields[6] + -fields[6] % 4


def modules_dir(tmp_path: Path, dependencies: str, built_in: str = "") -> Path:
    (tmp_path / "modules.dep").write_text(dependencies)
    (tmp_path / "modules.builtin").write_text(built_in)
    return tmp_path


def test_the_kernel_is_an_elf_image_too(store: ImageStore, workshop):
    kernel = store.ensure_kernel()
    assert kernel.vmlinux.read_bytes()[:4] == b"\x7fELF"
    assert extract_vmlinux(kernel.bzimage.read_bytes(), workshop) == kernel.vmlinux.read_bytes()
    assert kernel.version == kernel.modules_dir.name


@pytest.mark.parametrize("broken", [b"", b"x" * 4096, b"\x7fELF" + b"\0" * 4096])
def test_what_is_not_a_bzimage_is_refused(workshop, broken):
    with pytest.raises(HostNotReady, match="not a bzImage"):
        extract_vmlinux(broken, workshop)


def test_a_kernel_of_unknown_compression_is_refused(store: ImageStore, workshop):
    image = bytearray(store.ensure_kernel().bzimage.read_bytes())
    at = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    image[at : at + 4] = b"LZX!"
    with pytest.raises(HostNotReady, match="unknown way"):
        extract_vmlinux(bytes(image), workshop)


def test_modules_are_loaded_after_what_they_need(tmp_path):
    order = initramfs.load_order(
        modules_dir(tmp_path, "k/a.ko: k/b-b.ko k/c.ko\nk/b-b.ko: k/c.ko\nk/c.ko:\n"), ["a", "c"]
    )
    assert order == ["k/c.ko", "k/b-b.ko", "k/a.ko"]


def test_what_the_kernel_has_built_in_is_not_loaded(tmp_path):
    assert initramfs.load_order(modules_dir(tmp_path, "", "kernel/fs/ext4/ext4.ko\n"), ["ext4"]) == []


def test_a_module_that_is_nowhere_is_named(tmp_path):
    with pytest.raises(HostNotReady, match="has no module virtio_blk"):
        initramfs.load_order(modules_dir(tmp_path, ""), ["virtio_blk"])


def test_the_initramfs_has_all_modules_and_lists_them_in_order(store: ImageStore):
    inside = entries(store.ensure_guest().initrd.read_bytes())
    listed = inside["modules"].decode().split()
    names = [Path(path).stem.replace("-", "_") for path in listed]
    assert names.index("virtio") < names.index("virtio_blk")
    assert set(initramfs.MODULES) - set(names) <= {"ext4"}  # built in
    assert all(inside[path.lstrip("/")][:4] == b"\x7fELF" for path in listed)
    assert inside["init"].startswith(b"#!/bin/sh")
    assert inside["bin/sh"] == b"busybox"


def test_an_archive_has_the_same_bytes_every_time():
    def archive() -> bytes:
        cpio = Cpio()
        cpio.directory("dev")
        cpio.console()
        cpio.file("a", b"abc")
        cpio.symlink("b", "a")
        return cpio.finish()

    assert archive() == archive()
    assert entries(archive()) == {"dev": b"", "dev/console": b"", "a": b"abc", "b": b"a"}


@pytest.mark.parametrize("script", ["init", "instavm-init"])
def test_init_scripts_are_valid_for_the_guests_shell(store: ImageStore, tmp_path, script):
    busybox = tmp_path / "busybox"
    busybox.write_bytes(entries(store.ensure_guest().initrd.read_bytes())["bin/busybox"])
    busybox.chmod(0o755)
    subprocess.run([busybox, "sh", "-n", recipes.recipe_dir("system") / script], check=True)


def test_an_edited_agent_is_in_the_next_system_image_within_seconds(store: ImageStore, tmp_path, monkeypatch):
    """Only the cheap layer is made again; it holds the agent's source and its byte-code."""
    kernel = store.ensure_kernel()
    store.ensure_guest()
    base = system.ensure_base(store._bases, kernel)
    agent = shutil.copytree(system._agent(), tmp_path / "instavm_guest")
    (agent / "edited.py").write_text("EDITED = True\n")
    monkeypatch.setattr(system, "_agent", lambda: agent)
    began = time.monotonic()
    made = system.ensure_guest(Shelf(tmp_path / "guests"), base, kernel)
    assert time.monotonic() - began < 15
    listing = subprocess.run(
        ["unsquashfs", "-l", made / system.SYSTEM], capture_output=True, text=True, check=True
    ).stdout
    assert "/instavm_guest/edited.py" in listing
    assert "/instavm_guest/__pycache__/edited.cpython-" in listing
    assert not list((base / "tree").rglob("edited*"))


def test_an_empty_cache_has_nothing_and_nothing_is_built_by_looking(tmp_path):
    empty = ImageStore(tmp_path, disk_gib=10)
    assert empty.find_guest() is None
    assert empty.find("default") is None
    assert list(tmp_path.iterdir()) == []


def test_a_guests_digest_is_that_of_its_contents(store: ImageStore):
    first, second = store.ensure_guest(), store.find_guest()
    assert first == second
    assert len(first.digest) == 64
    assert all(path.is_file() for path in (first.kernel, first.vmlinux, first.initrd, first.system))


def test_an_agent_edited_while_it_is_built_is_not_kept_under_the_wrong_name(store, tmp_path, monkeypatch):
    kernel = store.ensure_kernel()
    store.ensure_guest()
    base = system.ensure_base(store._bases, kernel)
    agent = shutil.copytree(system._agent(), tmp_path / "instavm_guest")
    monkeypatch.setattr(system, "_agent", lambda: agent)

    def edit(_: str) -> None:
        (agent / "edited.py").write_text("EDITED = True\n")

    with pytest.raises(HostNotReady, match="edited while"):
        system.ensure_guest(Shelf(tmp_path / "guests"), base, kernel, edit)
