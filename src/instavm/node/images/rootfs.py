"""The default image: a Debian with the usual tools, as a sparse ext4 file below every sandbox's overlay."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from instavm.node.images import archive, recipes, trees
from instavm.node.images.shelf import Shelf
from instavm.node.images.workshop import Progress, Workshop, silent

DEFAULT: Final = "default"
ROOTFS: Final = "rootfs.ext4"
DESCRIPTION: Final = "image.json"
LABEL: Final = "instavm-root"

_BUILDER: Final = 1
_NEEDS_BYTES: Final = 6 << 30
_CHUNK: Final = 1 << 20

_DPKG_OPTIONS: Final = (
    "force-unsafe-io",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/man/*",
)
"""Kept in the image, so they hold for what users install later, too: nothing but programs and their data, as
in Debian's slim container images, and no waiting for a disk that doesn't outlive the sandbox anyway."""


_BUILD_ONLY: Final = (
    "etc/apt/apt.conf.d/99mmdebstrap",
    "root/.npm",
    "run/*",
    "tmp/*",
    "var/cache/apt/*.bin",
    "var/cache/debconf/*-old",
    "var/lib/apt/lists/*",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/*-old",
    "var/log/apt/*",
    "var/tmp/*",
)
"""What the build leaves behind, the host's apt settings among them. Not removed by mmdebstrap's hooks: it
keeps its own configuration in the image's /tmp and would fall back to the host's."""


@dataclass(frozen=True, slots=True)
class Image:
    """A root disk and what programs in it start with.

    digest: sha256, as hex, over the disk's contents and the configuration. rootfs: raw ext4, read-only.
    size_bytes: as the guest sees it. used_bytes: what the sparse file takes on the host. format: raw or qcow2.
    owner: the folder of the snapshot that it is, if it is one.
    """

    name: str
    digest: str
    rootfs: Path
    env: Mapping[str, str]
    workdir: str
    size_bytes: int
    used_bytes: int
    format: str = "raw"
    owner: Path | None = None


def image_key(name: str, disk_gib: int) -> str:
    """Changes with the recipe, the Debian release and the size of the disk."""
    recipe = recipes.tree_digest(recipes.recipe_dir(name))
    return recipes.key(
        {
            "builder": _BUILDER,
            "suite": archive.suite(),
            "recipe": recipe,
            "disk_gib": disk_gib,
            "dpkg": _DPKG_OPTIONS,
        }
    )


def find_image(shelf: Shelf, name: str, disk_gib: int) -> Image | None:
    """The image if it has been built."""
    folder = shelf.find(image_key(name, disk_gib))
    return _at(folder) if folder else None


def ensure_image(shelf: Shelf, name: str, disk_gib: int, progress: Progress = silent) -> Image:
    """Build the image unless it is there. Raises: HostNotReady, DiskFull."""
    key = image_key(name, disk_gib)
    return _at(
        shelf.ensure(key, lambda work: _make(work, name, key, disk_gib), needs_bytes=_NEEDS_BYTES, progress=progress)
    )


def sparse_digest(path: Path) -> str:
    """sha256, as hex, over the size and the data of a sparse file; holes cost nothing."""
    total = hashlib.sha256(path.stat().st_size.to_bytes(8))
    with path.open("rb", buffering=0) as file:
        for start, end in _data_ranges(file.fileno()):
            file.seek(start)
            for position in range(start, end, _CHUNK):
                body = file.read(min(_CHUNK, end - position))
                if body.strip(b"\0"):
                    total.update(position.to_bytes(8))
                    total.update(body)
    return total.hexdigest()


def _make(work: Workshop, name: str, key: str, disk_gib: int) -> None:
    recipe, tree, rootfs = recipes.recipe_dir(name), work.folder / "tree", work.folder / ROOTFS
    _bootstrap(work, recipe, tree)
    trees.remove(tree, _BUILD_ONLY)
    trees.copy(recipe / "overlay", tree)
    inside = {
        "python": _ask(work, tree, "python3", "--version"),
        "node": _ask(work, tree, "node", "--version"),
    }
    work.progress("writing the disk")
    options = "root_owner=0:0,lazy_itable_init=0,assume_storage_prezeroed=1,hash_seed=" + _uuid(key, "hash")
    features = ("-O", "^has_journal", "-m", "0", "-L", LABEL, "-U", _uuid(key, "disk"), "-E", options)
    work.run("mke2fs", "-q", "-t", "ext4", *features, "-d", tree, rootfs, f"{disk_gib}G", quiet=True)
    shutil.rmtree(tree)
    shutil.rmtree(work.folder / "apt", ignore_errors=True)
    work.progress("computing the digest")
    config = json.loads((recipe / "config.json").read_text())
    content = sparse_digest(rootfs)
    status = rootfs.stat()
    description = {
        "name": name,
        "digest": hashlib.sha256((content + json.dumps(config, sort_keys=True)).encode()).hexdigest(),
        "recipe": key,
        **config,
        **inside,
        "size_bytes": status.st_size,
        "used_bytes": status.st_blocks * 512,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (work.folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _bootstrap(work: Workshop, recipe: Path, tree: Path) -> None:
    source = archive.open_archive(work)
    customize = f'chroot "$1" sh -eu < {shlex.quote(str(recipe / "customize.sh"))}'
    work.run(
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--verbose"),
        *(f"--aptopt={option}" for option in source.options),
        *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
        f"--include={','.join(recipes.packages(recipe))}",
        f"--customize-hook={customize}",
        source.suite,
        tree,
        *source.sources,
        isolated=True,
    )


def _ask(work: Workshop, tree: Path, *argv: str) -> str:
    """The last word of what a program of the image prints, such as its version."""
    return work.run("chroot", tree, *argv, isolated=True, quiet=True).split()[-1]


def _uuid(key: str, purpose: str) -> str:
    digits = hashlib.sha256(f"{key} {purpose}".encode()).hexdigest()
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], "8" + digits[17:20], digits[20:32]))


def _data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    size, position = os.fstat(fd).st_size, 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def _at(folder: Path) -> Image:
    known = json.loads((folder / DESCRIPTION).read_text())
    size, used = int(known["size_bytes"]), int(known["used_bytes"])
    return Image(known["name"], known["digest"], folder / ROOTFS, known["env"], known["workdir"], size, used)
