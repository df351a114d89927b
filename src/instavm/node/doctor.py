"""What a host must have to run sandboxes, each with what to do when it is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instavm.contract.isolation import Tier
from instavm.errors import InstaVMError
from instavm.node import memory, parts
from instavm.node.images.store import ImageStore
from instavm.node.jail import jail
from instavm.node.machines import FREE_BYTES_MIN
from instavm.node.network import space
from instavm.node.parts import Part
from instavm.node.vmm import choose, firecracker, qemu
from instavm.node.vmm.memory import huge
from instavm.node.vmm.processor import CpuTemplate
from instavm.settings import Settings

PROGRAMS = {"qemu-img": "qemu-utils"}
NO_KVM = "a host whose processor's virtualization this one may use; docs/kvm.md"


Status = Literal["ok", "missing", "weaker"]
"""missing: it is not there, or does not work. weaker: there is less of it than there could be, most of all less isolation."""


@dataclass(frozen=True, slots=True)
class Check:
    """ok: nothing to be done before sandboxes can be started; so what is missing or weaker may be ok."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    status: Status = "ok"


def check(name: str, there: bool, detail: str, remedy: str = "") -> Check:
    """Of something that every sandbox needs."""
    return Check(name, there, detail, remedy, "ok" if there else "missing")


def weaker(name: str, detail: str, remedy: str = "") -> Check:
    return Check(name, True, detail, remedy, "weaker")


def checks(settings: Settings) -> Iterator[Check]:
    """Every precondition, in the order in which a sandbox needs them."""
    yield _qemu()
    for program, package in PROGRAMS.items():
        found = shutil.which(program)
        yield check(program, found is not None, found or "not found", f"apt-get install {package}")
    yield _jail(settings)
    yield _firecracker(settings)
    yield from _kvm(settings)
    yield from _nesting(settings)
    yield from _parts(settings)
    yield _network()
    yield _folder("state directory", settings.state_dir, "INSTAVM_STATE_DIR")
    yield _folder("cache directory", settings.cache_dir, "INSTAVM_CACHE_DIR")
    yield _image(settings)
    yield check("memory", memory.total_mib() >= 1024, f"{memory.total_mib()} MiB", "at least 1 GiB of memory")
    if settings.huge_pages == "on":
        there, free = huge("nr"), huge("free")
        yield check(
            "huge pages", there > 0, f"{there} of 2 MiB, {free} free", "sysctl vm.nr_hugepages=1024, as an example"
        )


def _qemu() -> Check:
    try:
        return check("qemu", True, qemu.installed_version())
    except InstaVMError as exc:
        return check("qemu", False, str(exc), "apt-get install qemu-system-x86")


def _jail(settings: Settings) -> Check:
    if settings.jail == "off":
        return Check(
            "jail",
            False,
            "INSTAVM_JAIL=off: VMMs and the API run unconfined, as the server",
            "unset INSTAVM_JAIL",
            "weaker",
        )
    try:
        made = jail.check(settings)
        return check("jail", True, made) if os.geteuid() == 0 else weaker("jail", made, "run the server as root")
    except InstaVMError as exc:
        return check("jail", False, str(exc), jail.HOW_TO_GET)


def _kvm(settings: Settings) -> Iterator[Check]:
    """Nothing that has to be done: without KVM sandboxes are emulated, and say so."""
    if (refused := choose.closed()) is not None:
        yield weaker("kvm", f"{refused}: sandboxes run on the emulated tier", NO_KVM)
        return
    try:
        found = choose.recorded(settings)
    except InstaVMError as exc:  # what is missing is told above
        yield weaker("kvm", f"not known: {exc}")
        return
    if found is None:
        yield weaker("kvm", f"{jail.KVM_DEVICE} opens; whether a guest boots on it is tried when the server starts")
        return
    for one in found:
        words = f"{one.words} (tried for {one.seconds:.1f} s)"
        yield check(one.driver, True, words) if one.works else weaker(one.driver, words, NO_KVM)


def _firecracker(settings: Settings) -> Check:
    """Has to be there only where it was asked for."""
    try:
        return check("firecracker", True, firecracker.installed_version(settings))
    except InstaVMError as exc:
        words = str(exc).removesuffix(f". {firecracker.HOW_TO_GET}")
        return Check("firecracker", settings.driver != "firecracker", words, firecracker.HOW_TO_GET, "missing")


def _nesting(settings: Settings) -> Iterator[Check]:
    module = choose.nests()
    template = CpuTemplate.of(settings.firecracker_cpu_template)
    if module is not None:
        shown = "are not shown it, but the code for it is there"
        if template is not None and template.nests:
            shown = f"see it under Firecracker: its CPU template {template.name} shows it"
        detail = f"{module} lets guests run guests of their own; sandboxes {shown}"
        yield weaker("nested virtualization", detail, f"options {module} nested=0, in /etc/modprobe.d")


def _parts(settings: Settings) -> Iterator[Check]:
    """How old what confines a sandbox is, and what is known to be wrong with it."""
    for part in _installed(settings):
        faults = "; ".join(map(str, part.faults))
        if faults:
            yield weaker(part.name, f"{part.words()}: {faults}", f"install a newer {part.component}")
        else:
            yield check(part.name, True, f"{part.words()}; no known fault as of {parts.as_of()}")


def _installed(settings: Settings) -> Iterator[Part]:
    """The parts of every VMM that this host may use, each once."""
    guest = ImageStore(settings.cache_dir, settings.disk_gib).find_guest()
    tier = Tier.KVM if choose.closed() is None else Tier.EMULATED
    versions: dict[str, Callable[[], str]] = {
        "qemu": qemu.installed_version,
        "firecracker": lambda: firecracker.installed_version(settings),
    }
    found: dict[tuple[str, str], Part] = {}
    for driver, version in versions.items():
        with suppress(InstaVMError):  # what is missing is told of elsewhere
            vmm = (driver, choose.program(settings, driver), version())
            for part in parts.parts(*vmm, tier, None if guest is None else guest.kernel):
                found[part.name, part.component] = part
    yield from found.values()


def _network() -> Check:
    """A failure for root only: for anybody else sandboxes without a network are all there can be."""
    lacking = space.lacking()
    if lacking is None:
        return check("network", True, "sandboxes can be given one")
    detail = f"sandboxes start without one, and no policy can open it: {lacking}"
    remedy = "apt-get install libnftables1; /dev/net/tun and CAP_NET_ADMIN"
    return check("network", False, detail, remedy) if os.geteuid() == 0 else weaker("network", detail, remedy)


def _folder(name: str, path: Path, variable: str) -> Check:
    place = path
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return check(name, False, f"{path}: {place} is not writable", f"set {variable} to a folder of yours")
    free = shutil.disk_usage(place).free
    enough = free >= FREE_BYTES_MIN
    return check(name, enough, f"{path}: {free >> 20} MiB free", f"free {FREE_BYTES_MIN >> 20} MiB or move {variable}")


def _image(settings: Settings) -> Check:
    image = ImageStore(settings.cache_dir, settings.disk_gib).find("default")
    if image is None:
        return check("default image", False, "not built yet", "./scripts/start")
    return check("default image", True, f"{image.used_bytes >> 20} MiB, {image.digest[:12]}")
