"""The system image: our agent, the Python that runs it and the kernel's modules, whatever the user's image.

Two layers: the *base* (Debian packages and modules; slow, rarely changes) and, on top, the agent with the
init scripts (seconds, changes with every edit of the agent).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Final

import instavm_guest
from instavm.errors import HostNotReady
from instavm.node.images import archive, initramfs, recipes, trees
from instavm.node.images.kernel import Kernel, kernel_key
from instavm.node.images.shelf import Shelf
from instavm.node.images.workshop import Progress, Workshop, silent

SYSTEM: Final = "system.squashfs"
INITRD: Final = "initrd.cpio"
DESCRIPTION: Final = "guest.json"

_BASE_BUILDER: Final = 1
_GUEST_BUILDER: Final = 1
_BASE_NEEDS_BYTES: Final = 800 << 20
_GUEST_NEEDS_BYTES: Final = 300 << 20

_MERGED: Final = ("bin", "lib", "lib64", "sbin")
_MERGE_USR: Final = " && ".join(f'mkdir -p "$1/usr/{name}" && ln -s usr/{name} "$1/{name}"' for name in _MERGED)
_FOLDERS: Final = ("dev", "etc", "proc", "run", "sandbox", "sys", "tmp", "var", "root")
_UNUSED: Final = (
    "etc/apt",
    "etc/dpkg",
    "usr/bin/dpkg*",
    "usr/lib/dpkg",
    "usr/lib/python3.*/ensurepip",
    "usr/lib/python3.*/idlelib",
    "usr/lib/python3.*/lib2to3",
    "usr/lib/python3.*/pydoc_data",
    "usr/lib/python3.*/test",
    "usr/lib/python3.*/tkinter",
    "usr/lib/python3.*/turtledemo",
    "usr/lib/python3.*/lib-dynload/_codecs_*",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/bin/perl*",
    "usr/share/[!d]*",
    "usr/share/d[!o]*",
    "usr/share/doc/*/[!c]*",
    "usr/share/doc/*/changelog*",
    "var/*",
)


def ensure_base(shelf: Shelf, kernel: Kernel, progress: Progress = silent) -> Path:
    """The expensive layer: a tree with Python, kmod, busybox and all modules of `kernel`.

    Raises: HostNotReady, DiskFull.
    """
    return shelf.ensure(
        base_key(), lambda work: _make_base(work, kernel), needs_bytes=_BASE_NEEDS_BYTES, progress=progress
    )


def base_key() -> str:
    wanted = recipes.packages(recipes.recipe_dir("system"))
    return recipes.key({"builder": _BASE_BUILDER, "kernel": kernel_key(), "packages": wanted, "unused": _UNUSED})


def ensure_guest(shelf: Shelf, base: Path, kernel: Kernel, progress: Progress = silent) -> Path:
    """The cheap layer: a folder with SYSTEM and INITRD, made from the agent's source that is running now.

    Raises: HostNotReady, DiskFull.
    """
    key = guest_key()

    def make(work: Workshop) -> None:
        _make_guest(work, key, base, kernel)

    return shelf.ensure(key, make, needs_bytes=_GUEST_NEEDS_BYTES, progress=progress)


def guest_key() -> str:
    """Changes with every byte of the agent or of the init scripts."""
    parts = {
        "agent": recipes.tree_digest(_agent()),
        "recipe": recipes.tree_digest(recipes.recipe_dir("system")),
    }
    return recipes.key({"builder": _GUEST_BUILDER, "base": base_key(), "modules": initramfs.MODULES, **parts})


def _agent() -> Path:
    assert instavm_guest.__file__ is not None
    return Path(instavm_guest.__file__).resolve().parent


def _make_base(work: Workshop, kernel: Kernel) -> None:
    tree = work.folder / "tree"
    source = archive.open_archive(work)
    work.run(
        *("mmdebstrap", "--mode=root", "--variant=extract", "--format=directory"),
        *(f"--aptopt={option}" for option in source.options),
        f"--include={','.join(recipes.packages(recipes.recipe_dir('system')))}",
        f"--setup-hook={_MERGE_USR}",
        source.suite,
        tree,
        *source.sources,
        isolated=True,
    )
    work.progress("adding the kernel's modules")
    trees.remove(tree, _UNUSED)
    for folder in _FOLDERS:
        (tree / folder).mkdir(exist_ok=True)
    (tree / "usr/lib/modules").mkdir()
    shutil.copytree(kernel.modules_dir, tree / "usr/lib/modules" / kernel.version, copy_function=os.link)
    work.run("chroot", tree, "/sbin/depmod", "-a", kernel.version, isolated=True)
    for applet in work.run(tree / "usr/bin/busybox", "--list", quiet=True).split():
        if not any(os.path.lexists(tree / folder / applet) for folder in ("usr/bin", "usr/sbin")):
            (tree / "usr/bin" / applet).symlink_to("busybox")
    work.progress("compiling Python's library")
    python = next((tree / "usr/lib").glob("python3.*"))
    _compile(work, tree, f"/usr/lib/{python.name}")
    shutil.rmtree(work.folder / "apt", ignore_errors=True)


def _make_guest(work: Workshop, key: str, base: Path, kernel: Kernel) -> None:
    work.progress("building the system image")
    tree, recipe = work.folder / "tree", recipes.recipe_dir("system")
    work.run("cp", "--archive", "--link", base / "tree", tree)
    python = next((tree / "usr/lib").glob("python3.*"))
    trees.copy(_agent(), python / "instavm_guest")
    _compile(work, tree, f"/usr/lib/{python.name}/instavm_guest")
    (tree / "usr/sbin/instavm-init").write_bytes((recipe / "instavm-init").read_bytes())
    (tree / "usr/sbin/instavm-init").chmod(0o755)
    fixed = ("-all-time", "0", "-mkfs-time", "0", "-all-root", "-no-xattrs", "-noappend", "-no-progress")
    work.run("mksquashfs", tree, work.folder / SYSTEM, "-comp", "lz4", *fixed, quiet=True)
    busybox, modules = (tree / "usr/bin/busybox").read_bytes(), tree / "usr/lib/modules" / kernel.version
    (work.folder / INITRD).write_bytes(initramfs.build(busybox, (recipe / "init").read_bytes(), modules))
    shutil.rmtree(tree)
    if guest_key() != key:
        raise HostNotReady("the agent's source was edited while the system image was made of it; try again")
    parts = (kernel.bzimage, work.folder / INITRD, work.folder / SYSTEM)
    digest = hashlib.sha256("".join(_sha256(part) for part in parts).encode()).hexdigest()
    (work.folder / DESCRIPTION).write_text(json.dumps({"digest": digest, "kernel": kernel.version}, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compile(work: Workshop, tree: Path, inside: str) -> None:
    """Byte-code by the guest's own Python. `unchecked-hash`: it is never compared with the source."""
    script = (
        "/usr/bin/python3",
        "-S",
        "-E",
        "-m",
        "compileall",
        "-q",
        "--invalidation-mode",
        "unchecked-hash",
        inside,
    )
    work.run("chroot", tree, *script, isolated=True)
