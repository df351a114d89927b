"""What a host must have to run sandboxes, each with what to do when it is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instavm.errors import InstaVMError
from instavm.node import memory
from instavm.node.images.store import ImageStore
from instavm.node.jail import jail
from instavm.node.machines import FREE_BYTES_MIN
from instavm.node.network import space
from instavm.node.vmm import choose, firecracker, qemu
from instavm.node.vmm.memory import huge
from instavm.settings import Settings

PROGRAMS = {"qemu-img": "qemu-utils"}


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(settings: Settings) -> Iterator[Check]:
    """Every precondition, in the order in which a sandbox needs them."""
    yield _qemu()
    for program, package in PROGRAMS.items():
        found = shutil.which(program)
        yield Check(program, found is not None, found or "not found", f"apt-get install {package}")
    yield _jail(settings)
    yield _firecracker(settings)
    yield from _kvm(settings)
    yield _network()
    yield _folder("state directory", settings.state_dir, "INSTAVM_STATE_DIR")
    yield _folder("cache directory", settings.cache_dir, "INSTAVM_CACHE_DIR")
    yield _image(settings)
    yield Check("memory", memory.total_mib() >= 1024, f"{memory.total_mib()} MiB", "at least 1 GiB of memory")
    if settings.huge_pages == "on":
        there, free = huge("nr"), huge("free")
        yield Check(
            "huge pages", there > 0, f"{there} of 2 MiB, {free} free", "sysctl vm.nr_hugepages=1024, as an example"
        )


def _qemu() -> Check:
    try:
        return Check("qemu", True, qemu.installed_version())
    except InstaVMError as exc:
        return Check("qemu", False, str(exc), "apt-get install qemu-system-x86")


def _jail(settings: Settings) -> Check:
    if settings.jail == "off":
        return Check(
            "jail", False, "INSTAVM_JAIL=off: VMMs and the API run unconfined, as the server", "unset INSTAVM_JAIL"
        )
    try:
        return Check("jail", True, jail.check(settings))
    except InstaVMError as exc:
        return Check("jail", False, str(exc), jail.HOW_TO_GET)


def _kvm(settings: Settings) -> Iterator[Check]:
    """Never a failure: without KVM sandboxes are emulated, and say so."""
    if (refused := choose.closed()) is not None:
        yield Check("kvm", True, f"{refused}: sandboxes run on the emulated tier")
        return
    try:
        found = choose.recorded(settings)
    except InstaVMError as exc:  # what is missing is told above
        yield Check("kvm", True, f"not known: {exc}")
        return
    if found is None:
        yield Check(
            "kvm", True, f"{jail.KVM_DEVICE} opens; whether a guest boots on it is tried when the server starts"
        )
        return
    for one in found:
        yield Check(one.driver, True, f"{one.words} (tried for {one.seconds:.1f} s)")


def _firecracker(settings: Settings) -> Check:
    """A failure only for who has asked for it."""
    try:
        return Check("firecracker", True, firecracker.installed_version(settings))
    except InstaVMError as exc:
        return Check("firecracker", settings.driver != "firecracker", str(exc), firecracker.HOW_TO_GET)


def _network() -> Check:
    """A failure for root only: for anybody else sandboxes without a network are all there can be."""
    lacking = space.lacking()
    if lacking is None:
        return Check("network", True, "sandboxes can be given one")
    detail = f"sandboxes start without one, and no policy can open it: {lacking}"
    return Check("network", os.geteuid() != 0, detail, "apt-get install libnftables1; /dev/net/tun and CAP_NET_ADMIN")


def _folder(name: str, path: Path, variable: str) -> Check:
    place = path
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Check(name, False, f"{path}: {place} is not writable", f"set {variable} to a folder of yours")
    free = shutil.disk_usage(place).free
    enough = free >= FREE_BYTES_MIN
    return Check(name, enough, f"{path}: {free >> 20} MiB free", f"free {FREE_BYTES_MIN >> 20} MiB or move {variable}")


def _image(settings: Settings) -> Check:
    image = ImageStore(settings.cache_dir, settings.disk_gib).find("default")
    if image is None:
        return Check("default image", False, "not built yet", "./scripts/start")
    return Check("default image", True, f"{image.used_bytes >> 20} MiB, {image.digest[:12]}")
