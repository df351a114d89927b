"""A Debian image, made out of the default one: apt, pip, npm and git with all that they need, and nothing else."""

from __future__ import annotations

import fcntl
import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

from instavm.node.images.store import ImageStore
from instavm.settings import Settings

WANTED = ("apt", "ca-certificates", "git", "nodejs", "npm", "python3-pip")
ESSENTIAL = re.compile(r"^(Essential: yes|Priority: required)$", re.MULTILINE)
CONFIGURATION = ("etc/apt", "etc/pip.conf", "etc/npmrc", "etc/passwd", "etc/group", "etc/ssl", "etc/ld.so.cache")
"""What packages leave behind when they are configured, besides their own files."""


@contextmanager
def tree():
    """The default image's files, to be read."""
    settings = Settings()
    rootfs = ImageStore(settings.cache_dir, settings.disk_gib).find("default").rootfs
    with tempfile.TemporaryDirectory(prefix="ivm-tree-") as place:
        subprocess.run(["mount", "-o", "loop,ro,noload", rootfs, place], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


def closure(status: str, wanted) -> dict[str, str]:
    """Packages and all that they depend on: what dpkg's status says of each."""
    known = {found[1]: part for part in status.split("\n\n") if (found := re.match(r"Package: (\S+)", part))}
    provided = {}
    for name, part in known.items():
        for line in re.findall(r"^Provides: (.*)", part, re.MULTILINE):
            provided |= {re.split(r"[ (:]", one.strip())[0]: name for one in line.split(",")}
    todo = [*wanted, *(name for name, part in known.items() if ESSENTIAL.search(part))]
    found = {}
    while todo:
        name = todo.pop()
        name = name if name in known else provided.get(name)
        if name is None or name in found:
            continue
        found[name] = known[name]
        for line in re.findall(r"^(?:Pre-)?Depends: (.*)", known[name], re.MULTILINE):
            todo += [re.split(r"[ (:|]", one.strip())[0] for group in line.split(",") for one in group.split("|")]
    return found


def files_of(root: Path, packages) -> list[str]:
    names, own = [], {}
    for file in (root / "var/lib/dpkg/info").iterdir():
        if found := re.fullmatch(r"(.+?)(?::amd64)?\.([a-z]+)", file.name):
            own.setdefault(found[1], {})[found[2]] = file
    for name in packages:
        names += [str(file.relative_to(root)) for file in own[name].values()]
        listed = own[name]["list"]
        names += [line.lstrip("/") for line in listed.read_text().splitlines() if line != "/."]
    return names


def layers() -> list[bytes]:
    """Two, the first with the links at the top that all paths go through. Made once, under the cache folder."""
    settings = Settings()
    image = ImageStore(settings.cache_dir, settings.disk_gib).find("default")
    kept = settings.cache_dir / "tests" / "debian-image" / f"{image.digest[:16]}.tar"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with (kept.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            _make(kept)
    return [kept.read_bytes()]


def _make(kept: Path) -> None:
    with tree() as root, tempfile.TemporaryDirectory() as more:
        packages = closure((root / "var/lib/dpkg/status").read_text(), WANTED)
        status = Path(more) / "var/lib/dpkg/status"
        status.parent.mkdir(parents=True)
        status.write_text("\n\n".join(packages.values()) + "\n")
        names = ["bin", "sbin", "lib", "lib64", "dev", "proc", "sys", "tmp", "run", "root", "app", "var/lib/apt"]
        names += ["var/cache/apt", "etc/alternatives", "usr/bin/python3", "usr/lib/locale", *CONFIGURATION]
        for deep in ("etc/apt", "etc/ssl", "etc/alternatives"):
            names += [str(file.relative_to(root)) for file in sorted((root / deep).rglob("*"))]
        names += files_of(root, packages)
        names = [re.sub(r"^(bin|sbin|lib|lib64)/", r"usr/\1/", name) for name in names]  # links, in a merged /usr
        there = dict.fromkeys(name for name in names if (root / name).is_symlink() or (root / name).exists())
        listed, new = Path(more) / "names", kept.with_suffix(".new")
        listed.write_text("\n".join(there) + "\n")
        tar = ["tar", "--sort=none", "--numeric-owner", "--no-recursion", "-C", root, "-cf", new, "-T", listed]
        subprocess.run(tar, check=True)
        subprocess.run(["tar", "-rf", new, "-C", more, "var/lib/dpkg/status"], check=True)
        new.rename(kept)
