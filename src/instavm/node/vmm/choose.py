"""Which driver this host gets. A device node proves nothing: hardware virtualisation counts once a guest has booted."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path

import anyio

from instavm.node.images.store import GuestBase, ImageStore
from instavm.node.jail.jail import KVM_DEVICE, Jails
from instavm.node.vmm import qemu
from instavm.node.vmm.base import Driver
from instavm.settings import Settings

PROBE_DEADLINE_S = 8.0
"""Hardware virtualisation needs well under a second; what takes longer is not what a sandbox should run on."""


async def choose(settings: Settings, jails: Jails) -> tuple[Driver, str]:
    """The driver, and in words how it was chosen. Raises HostNotReady."""
    if settings.acceleration != "auto":
        return qemu.QemuDriver(settings.acceleration, jails), f"acceleration={settings.acceleration} was set"
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        why = "can't be opened by this user" if KVM_DEVICE.exists() else "is not there"
        return qemu.QemuDriver("tcg", jails), f"{KVM_DEVICE} {why}"
    works, words = await _remembered(settings)
    return qemu.QemuDriver("kvm" if works else "tcg", jails), words


async def _remembered(settings: Settings) -> tuple[bool, str]:
    """The probe's answer, asked again when kernel, VMM or boot have changed."""
    version = await anyio.to_thread.run_sync(qemu.installed_version)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    about = f"{platform.release()} {boot} qemu {version}"
    record = settings.state_dir / "kvm-probe.json"
    try:
        known = json.loads(record.read_text())
        if known["about"] == about:
            return bool(known["works"]), str(known["words"])
    except (OSError, ValueError, KeyError):
        pass  # never asked, or not readable: ask
    store = ImageStore(settings.cache_dir, settings.disk_gib)
    works, words = await probe(await anyio.to_thread.run_sync(store.ensure_guest))
    record.write_text(json.dumps({"about": about, "works": works, "words": words}))
    return works, words


async def probe(guest: GuestBase, acceleration: str = "kvm") -> tuple[bool, str]:
    """Boot our kernel until its init switches it off, or the deadline passes: whether it did, and in words what was seen."""
    with tempfile.TemporaryFile() as log:
        command = [
            *(
                qemu.BINARY,
                "-M",
                "microvm,rtc=on",
                "-accel",
                acceleration,
                "-cpu",
                qemu.CPU[acceleration],
                "-m",
                "256M",
            ),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"),
            *("-kernel", str(guest.kernel), "-initrd", str(guest.initrd)),
            *("-append", qemu.kernel_arguments(acceleration) + " instavm.probe"),
        ]
        async with await anyio.open_process(command, stdin=None, stdout=log, stderr=log) as process:
            with anyio.move_on_after(PROBE_DEADLINE_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                return False, f"{KVM_DEVICE} opens, but a guest does not boot on it within {PROBE_DEADLINE_S:.0f} s"
        log.seek(0)
        said = log.read().decode(errors="replace")
    if process.returncode == 0 and "instavm.probe: up" in said:
        return True, f"a guest booted with {acceleration}"
    last = said.strip().splitlines()[-1:] or ["nothing"]
    return False, f"{KVM_DEVICE} opens, but QEMU stopped with status {process.returncode}: {last[0][:200]}"
