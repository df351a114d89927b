"""Which driver this host gets. A device node proves nothing: hardware virtualisation counts once a guest has booted."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Final

import anyio

from instavm.errors import HostNotReady
from instavm.node.images.store import GuestBase, ImageStore
from instavm.node.jail.jail import KVM_DEVICE, Jails
from instavm.node.vmm import firecracker, qemu
from instavm.node.vmm.base import Driver
from instavm.node.vmm.firecracker import FirecrackerDriver
from instavm.node.vmm.qemu import QemuDriver
from instavm.settings import Settings

RECORD: Final = "probe.json"
UP: Final = b"instavm.probe: up"
"""What the guest's init says, told to, before anything else."""
MEMORY_MIB: Final = 256
MODULES: Final = Path("/sys/module")
_DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a guest booted on one driver, in words what was seen, and how long it took from power on to its init."""

    driver: str
    works: bool
    words: str
    seconds: float


async def choose(settings: Settings, jails: Jails) -> tuple[Driver, str]:
    """The driver, and in words how it was chosen. Raises HostNotReady."""
    huge = settings.huge_pages == "on"

    def on_qemu(acceleration: str) -> Driver:
        return QemuDriver(acceleration, jails, huge_pages=huge)

    if settings.driver == "firecracker":
        if huge:
            raise HostNotReady(
                "Firecracker can't map a template with huge pages: set INSTAVM_HUGE_PAGES=off, or INSTAVM_DRIVER=qemu"
            )
        return FirecrackerDriver(settings, jails), "driver=firecracker was set"
    if settings.acceleration != "auto":
        return on_qemu(settings.acceleration), f"acceleration={settings.acceleration} was set"
    if (refused := closed()) is not None:
        return on_qemu("tcg"), refused
    found = await _remembered(settings)
    for one in found:
        if one.works:
            driver = FirecrackerDriver(settings, jails) if one.driver == "firecracker" else on_qemu("kvm")
            return driver, f"{one.words} in {one.seconds:.1f} s"
    return on_qemu("tcg"), "; ".join(one.words for one in found)


def closed() -> str | None:
    """Why there can be no hardware virtualisation here, without trying; None: it has to be tried."""
    if os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return None
    return f"{KVM_DEVICE} {'cannot be opened by this user' if KVM_DEVICE.exists() else 'is not there'}"


def recorded(settings: Settings) -> tuple[Finding, ...] | None:
    """What was found when it was last tried, on this kernel and since this boot; None: it has to be tried again."""
    try:
        known = json.loads((settings.state_dir / RECORD).read_text())
        if known["about"] == _about(settings):
            return tuple(Finding(**one) for one in known["found"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never asked, or not readable: ask
    return None


async def _remembered(settings: Settings) -> tuple[Finding, ...]:
    """The answers of all drivers that may be used, best first; asked again when kernel, VMMs or boot have changed."""
    known = await anyio.to_thread.run_sync(recorded, settings)
    if known is None:
        store = ImageStore(settings.cache_dir, settings.disk_gib)
        guest = await anyio.to_thread.run_sync(store.ensure_guest)
        known = await probe(settings, guest)
        told = {"about": _about(settings), "found": [asdict(one) for one in known]}
        (settings.state_dir / RECORD).write_text(json.dumps(told, indent=1))
    return known


async def probe(settings: Settings, guest: GuestBase) -> tuple[Finding, ...]:
    """Boot a guest on every driver that needs KVM and may be used. Raises HostNotReady: there is no QEMU either."""
    found = []
    if (refused := _refused_firecracker(settings)) is not None:
        found.append(Finding("firecracker", False, refused, 0.0))
    if _firecracker_version(settings) is not None:
        with tempfile.TemporaryDirectory() as folder:
            found.append(await boots("firecracker", _firecracker(settings, guest, Path(folder)), settings))
    found.append(await boots("qemu-kvm", qemu_command(guest, "kvm"), settings))
    return tuple(found)


async def boots(name: str, command: Sequence[str], settings: Settings) -> Finding:
    """Boot our kernel until its init speaks, or the deadline passes."""
    began, said = monotonic(), b""
    async with await anyio.open_process([*_DIES_WITH_US, *command], stdin=None, stderr=-2) as process:
        assert process.stdout is not None
        with anyio.move_on_after(settings.probe_timeout_s) as waited:
            async for piece in process.stdout:
                said += piece
                if UP in said:
                    break
        seconds = round(monotonic() - began, 2)
        if process.returncode is None:
            process.kill()
        await process.wait()
    if UP in said:
        return Finding(name, True, f"a guest booted with {name}", seconds)
    if waited.cancelled_caught:
        why = f"{KVM_DEVICE} opens, but a guest does not boot on it with {name} within {settings.probe_timeout_s:.0f} s"
        return Finding(name, False, why, seconds)
    last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
    return Finding(name, False, f"{KVM_DEVICE} opens, but {name} ended: {last[0][:200]}", seconds)


def qemu_command(guest: GuestBase, acceleration: str) -> list[str]:
    return [
        *(qemu.BINARY, "-M", "microvm,rtc=on", "-accel", acceleration, "-cpu", qemu.cpu(acceleration)),
        *(
            "-m",
            f"{MEMORY_MIB}M",
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-serial",
            "stdio",
        ),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd)),
        *("-append", qemu.kernel_arguments(acceleration) + " instavm.probe"),
    ]


def _firecracker(settings: Settings, guest: GuestBase, folder: Path) -> list[str]:
    """Without its jailer: nothing runs in it but our own kernel, up to the first words of its init."""
    boot = {
        "kernel_image_path": str(guest.vmlinux),
        "initrd_path": str(guest.initrd),
        "boot_args": firecracker.KERNEL_ARGUMENTS + " instavm.probe",
    }
    size = {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB}
    config = folder / "probe.json"
    config.write_text(json.dumps({"boot-source": boot, "machine-config": size, "drives": []}))
    program, _ = firecracker.programs(settings)
    return [str(program), "--no-api", "--config-file", str(config), "--level", "Error"]


def program(settings: Settings, driver: str) -> Path:
    """Where the VMM of a driver is. Raises HostNotReady."""
    return firecracker.programs(settings)[0] if driver == "firecracker" else Path(qemu.binary())


def nests() -> str | None:
    """The module of the host's KVM that lets guests run guests of their own, if one does."""
    for name in ("kvm_intel", "kvm_amd"):
        with contextlib.suppress(OSError):
            if (MODULES / name / "parameters" / "nested").read_text().strip() in ("1", "Y"):
                return name
    return None


def _about(settings: Settings) -> str:
    """What an answer holds for: this kernel since this boot, and these VMMs. Raises HostNotReady."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    other = _firecracker_version(settings) or _refused_firecracker(settings)
    return f"{platform.release()} {boot} qemu {qemu.installed_version()} firecracker {other}"


def _refused_firecracker(settings: Settings) -> str | None:
    """Why the one that is there, and might be chosen, is not used; None: there is none, or it may be used."""
    if settings.driver != "auto" or settings.huge_pages == "on":
        return None
    try:
        firecracker.programs(settings)
    except HostNotReady:
        return None
    try:
        firecracker.installed_version(settings)
    except HostNotReady as exc:
        return str(exc)
    return None


def _firecracker_version(settings: Settings) -> str | None:
    """Of the one that may be chosen; None: there is none, or it is not to be."""
    if settings.driver != "auto" or settings.huge_pages == "on":
        return None
    try:
        return firecracker.installed_version(settings)
    except HostNotReady:
        return None
