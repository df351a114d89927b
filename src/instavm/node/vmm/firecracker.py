"""The Firecracker driver: KVM only, control over its HTTP socket, agent over vsock, always in its jailer.

All paths that Firecracker is told are those inside its jail, the same for every machine, so that a state that was saved in one
jail can be loaded in another.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from fcntl import ioctl
from pathlib import Path
from typing import Final
from weakref import WeakSet

import anyio
from anyio.abc import ByteStream

from instavm.contract.isolation import Tier
from instavm.errors import BootFailed, HostNotReady
from instavm.node import parts, planted
from instavm.node.jail import jailer
from instavm.node.jail.jail import Cage, Jailed, Jails, Needs
from instavm.node.jail.jailer import Cell
from instavm.node.network.addresses import GUEST_MAC
from instavm.node.network.space import TUNGETDEVNETNS
from instavm.node.vmm import pages, processor
from instavm.node.vmm.base import HARDWARE, MachineSpec, Saved
from instavm.node.vmm.disk_server import DiskServer, open_fuse
from instavm.node.vmm.firecracker_api import Api
from instavm.node.vmm.process import OneProcess, VMMProcess
from instavm.node.vmm.processor import CpuTemplate
from instavm.node.vmm.vsock import VsockLine
from instavm.settings import Settings

OLDEST: Final = (1, 12)
CID: Final = 3
KERNEL: Final = "vmlinux"
"""Firecracker boots no bzImage. The same kernel as an ELF lies beside the one that a spec names."""
KERNEL_ARGUMENTS: Final = (
    "console=ttyS0 quiet reboot=k panic=-1 pci=off mitigations=off no_timer_check i8042.noaux i8042.nomux i8042.dumbkbd "
    "psi=0 nowatchdog cgroup.memory=nokmem noautogroup"
)
TUNSETPERSIST, TUNGETIFF = 0x400454CB, 0x800454D2  # linux/if_tun.h
REFILL_MS: Final = 1000
GOOD: Final = "1.14.4, 1.15.1 and later have none of this (1.16.1 is best: clocks of restored guests are right)"
HOW_TO_GET: Final = "Take firecracker and jailer from the same upstream release; docs/kvm.md says where to put them"

Call = tuple[str, str, Mapping[str, object]]


def calls(
    spec: MachineSpec,
    limits: Mapping[str, object],
    network: Mapping[str, object] | None,
    template: CpuTemplate | None = None,
) -> Iterator[Call]:
    """What a machine is told before it is powered on, in order. limits: of its disk. network: its device's own."""
    machine: dict[str, object] = {
        "vcpu_count": spec.vcpus,
        "mem_size_mib": spec.memory_mib,
        "smt": False,
        "track_dirty_pages": True,
    }
    if template is not None and template.custom is None:
        machine["cpu_template"] = template.name
    boot = {"kernel_image_path": "/kernel", "initrd_path": "/initrd", "boot_args": KERNEL_ARGUMENTS}
    yield "PUT", "/machine-config", machine
    if template is None or template.custom is not None:
        yield "PUT", "/cpu-config", processor.without_virtualization(None if template is None else template.custom)
    yield "PUT", "/boot-source", boot
    yield "PUT", "/drives/system", drive("system", "/system", read_only=True)
    yield "PUT", "/drives/root", {**drive("root", "/disk", read_only=False), "rate_limiter": limits}
    if network is not None:
        yield "PUT", "/network-interfaces/net", {"iface_id": "net", "guest_mac": GUEST_MAC, **network}
    yield "PUT", "/vsock", {"guest_cid": CID, "uds_path": "/agent.sock"}


def drive(name: str, path: str, *, read_only: bool) -> dict[str, object]:
    about = {"drive_id": name, "path_on_host": path, "is_root_device": False, "is_read_only": read_only}
    return {**about, "cache_type": "Unsafe", "io_engine": "Sync"}


def disk_limits(settings: Settings) -> dict[str, object]:
    return {"bandwidth": _bucket(settings.io_mib_per_s << 20), "ops": _bucket(settings.io_operations_per_s)}


def network_limits(settings: Settings) -> dict[str, object]:
    """Empty when there is no limit."""
    rate = settings.egress_mbit_per_s
    if rate is None:
        return {}
    limit = {"bandwidth": _bucket(int(rate * 125_000))}
    return {"rx_rate_limiter": limit, "tx_rate_limiter": limit}


def _bucket(per_second: int) -> dict[str, int]:
    return {"size": per_second, "refill_time": REFILL_MS}


class FirecrackerMachine(OneProcess):
    def __init__(self, process: VMMProcess, api: Api, disk: DiskServer, root: Path, saved: Saved | None) -> None:
        super().__init__(process)
        self._api = api
        self._disk = disk
        self._root = root
        self._saved = saved
        self._running = anyio.Event()
        self._fresh = False
        self._lines = WeakSet[VsockLine]()
        self._after_load: tuple[Call, ...] = ()

    async def dial(self) -> ByteStream:
        line = VsockLine(self._root / "agent.sock", self._running, lambda: self.alive, fresh=self._fresh)
        self._lines.add(line)
        return line

    async def load(self, *, background: bool = False) -> None:
        assert self._saved is not None, "only a prepared machine can be loaded"
        self._process.in_background(background)
        memory = {"backend_type": "File", "backend_path": "/memory"}
        how = {"snapshot_path": "/state", "mem_backend": memory, "enable_diff_snapshots": True, "resume_vm": False}
        await self._api.call("PUT", "/snapshot/load", how)
        if self._saved.changes is not None:
            await anyio.to_thread.run_sync(pages.load, self.pid, self._saved.memory, self._saved.changes)
        for method, path, body in self._after_load:
            await self._api.call(method, path, body)
        await self._go_on()

    async def power_on(self, told: tuple[Call, ...]) -> None:
        """Once, on a machine that was not prepared. Raises BootFailed."""
        self._fresh = True
        for method, path, body in told:
            await self._api.call(method, path, body)
        await self._api.call("PUT", "/actions", {"action_type": "InstanceStart"})
        self._running.set()

    async def pause(self) -> None:
        await self._api.call("PATCH", "/vm", {"state": "Paused"})
        await anyio.to_thread.run_sync(self._write_out)

    async def resume(self) -> None:
        self._process.in_background(False)
        await self._go_on()

    async def save(self, state: Path) -> None:
        assert self._saved is not None
        await self._snapshot(state, self._saved.memory)  # the first since power on: it holds all that was ever written

    async def save_changes(self, memory: Path, state: Path, changes: Path) -> None:
        # Firecracker's own pages since its last snapshot are not all that differ from the template, so these are found as
        # they are for any VMM; what it writes of them here is thrown away.
        with pages.created(changes) as into:
            since = self._root / "since"
            await self._snapshot(state, since)
            since.unlink()
            await anyio.to_thread.run_sync(pages.save, self.pid, memory, into)

    async def new_layer(self, layer: Path) -> None:
        self._process.cage.own(layer)
        await self._disk.new_layer(layer)

    async def merge_layers(self, base: Path) -> None:
        raise BootFailed(f"disks of {FirecrackerDriver.name} can't be merged while they are used")

    async def metrics(self) -> str:
        """What Firecracker counts, as a line of JSON. Raises BootFailed."""
        await self._api.call("PUT", "/actions", {"action_type": "FlushMetrics"})
        return self._api.metrics()

    async def console(self) -> str:
        return self._process.last_words(1 << 16)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._api.aclose()
            self._process.stop()
            await self._disk.aclose()
            await self._process.kill()
            self._running.set()
            await anyio.to_thread.run_sync(shutil.rmtree, self._root.parents[1], True)

    async def detach(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._api.aclose()
            await self._disk.detach()
            self._process.let_go()

    async def _go_on(self) -> None:
        await self._api.call("PATCH", "/vm", {"state": "Resumed"})
        self._running.set()

    async def _snapshot(self, state: Path, memory: Path) -> None:
        """Devices, and the pages written since the last time, with holes in place of the others.

        Both files are Firecracker's first, and ours when this returns.
        """
        made = {"snapshot_path": self._root / "made-state", "mem_file_path": self._root / "made-memory"}
        paths = {name: f"/{path.name}" for name, path in made.items()}
        await self._api.call("PUT", "/snapshot/create", {"snapshot_type": "Diff", **paths})
        for line in self._lines:
            line.renew()
        for path, final in zip(made.values(), (state, memory), strict=True):
            await anyio.to_thread.run_sync(planted.take, path, final)

    def _write_out(self) -> None:
        """What the server of the disk still has in memory goes to its files."""
        fd = os.open(f"/proc/{self.pid}/root/disk", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class FirecrackerDriver:
    name = "firecracker"
    tier = Tier.KVM

    def __init__(self, settings: Settings, jails: Jails) -> None:
        """Raises HostNotReady: the CPU template that was set is none."""
        self._settings = settings
        self._jails = jails
        self._version: str | None = None
        self._template = CpuTemplate.of(settings.firecracker_cpu_template)

    async def version(self) -> str:
        if self._version is None:
            self._version = await anyio.to_thread.run_sync(installed_version, self._settings)
        return self._version

    def fingerprint(self, hardware: int = HARDWARE) -> str:
        template = "" if self._template is None else f" CPU template {self._template.name}"
        seen = "" if hardware == 1 else f" hardware {hardware}"
        return f"{self.name} {self._version} {KERNEL_ARGUMENTS}{template}{seen}"

    def processor(self) -> str:
        return processor.host() if self._template is None else self._template.shown()

    def close(self) -> None:
        """Holds nothing."""

    async def boot(self, saved: Saved, disk: Path, home: Path, *, tap: int | None = None) -> FirecrackerMachine:
        spec = saved.spec
        shown = (
            (spec.kernel.with_name(KERNEL), "kernel"),
            (spec.initrd, "initrd"),
            (spec.system, "system"),
        )
        made, network = await self._spawn(saved, disk, home, shown, tap)
        try:
            await made.power_on(tuple(calls(spec, disk_limits(self._settings), network, self._template)))
        except BaseException:
            await made.aclose()
            raise
        return made

    async def prepare(
        self, saved: Saved, disk: Path, home: Path, *, background: bool, tap: int | None = None
    ) -> FirecrackerMachine:
        if saved.changes is not None:
            await anyio.to_thread.run_sync(pages.check, saved.memory, saved.changes)
        for file in (saved.memory, saved.state):
            file.chmod(0o444)  # the folder is nobody's but ours, and in the jail it can't be written
        shown = ((saved.memory, "memory"), (saved.state, "state"), (saved.spec.system, "system"))
        made, network = await self._spawn(saved, disk, home, shown, tap, background=background)
        limits: list[Call] = [
            ("PATCH", "/drives/root", {"drive_id": "root", "rate_limiter": disk_limits(self._settings)})
        ]
        if network is not None and (now := network_limits(self._settings)):
            limits.append(("PATCH", "/network-interfaces/net", {"iface_id": "net", **now}))
        made._after_load = tuple(limits)
        return made

    async def adopt(self, pid: int, home: Path) -> FirecrackerMachine:
        try:
            process = VMMProcess.adopt(pid, self._jails, home, log=home / "vmm.log")
        except (ProcessLookupError, FileNotFoundError) as exc:
            raise BootFailed(f"process {pid} of {home.name} is gone") from exc
        try:
            root = jailer.find_root(home)
            if root is None:
                raise BootFailed(f"{home.name} has no jail")
            made = FirecrackerMachine(process, Api(root, process.last_words), await DiskServer.adopt(home), root, None)
            made._running.set()
            return made
        except BaseException:
            await process.kill()
            raise

    async def _spawn(
        self,
        saved: Saved,
        disk: Path,
        home: Path,
        shown: tuple[tuple[Path, str], ...],
        tap: int | None,
        *,
        background: bool = False,
    ) -> tuple[FirecrackerMachine, Mapping[str, object] | None]:
        """A VMM that has been told nothing yet, and what its network device is to be told."""
        firecracker, jail = programs(self._settings)
        spec = saved.spec
        if not self._jails.on:
            raise HostNotReady("Firecracker runs in its jailer only, which needs root and INSTAVM_JAIL=on")
        for file in (disk, *(file for file, _ in shown), *saved.layers):
            if not file.exists():
                raise HostNotReady(f"{file} is not there")
        needs = Needs(home, spec.vcpus, spec.memory_mib, (disk,))
        cage = await self._jails.make(needs)
        servers: list[DiskServer] = []
        network: dict[str, object] | None = None
        try:
            with ExitStack() as opened:
                fuse = open_fuse(opened)
                namespace = None
                if spec.network:
                    assert tap is not None, "a machine with a network device needs a tap"
                    namespace, name = _let_go(tap, opened)
                    network = {"host_dev_name": name, **network_limits(self._settings)}

                async def start(output: int) -> Jailed:
                    server = await DiskServer.start(self._jails, cage, needs, disk, saved.layers, fuse, output)
                    servers.append(server)
                    cell = Cell(firecracker, jail, home, fuse, server.pid, shown, namespace)
                    return await jailer.start(self._jails, cage, cell, output)

                process = await VMMProcess.spawn(start, log=home / "vmm.log")
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _undo(servers, cage)
            raise
        root = jailer.root_of(home, firecracker)
        made = FirecrackerMachine(process, Api(root, process.last_words), servers[0], root, saved)
        try:
            process.in_background(background)
            await made._api.ready(lambda: process.alive)
            await servers[0].serve()
        except BaseException:
            await made.aclose()
            raise
        return made, network


async def _undo(servers: list[DiskServer], cage: Cage) -> None:
    for server in servers:
        await server.aclose()
    await anyio.to_thread.run_sync(cage.remove)


def _let_go(tap: int, opened: ExitStack) -> tuple[int, str]:
    """The namespace and the name of a tap, which stays there for Firecracker to open: it takes none that is open.

    The descriptor stays valid for its owner to close, but is not the tap's any more.
    """
    name = ioctl(tap, TUNGETIFF, struct.pack("40x"))[:16].rstrip(b"\0").decode()
    namespace = ioctl(tap, TUNGETDEVNETNS)
    opened.callback(os.close, namespace)
    ioctl(tap, TUNSETPERSIST, 1)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, tap, inheritable=False)
    os.close(nothing)
    return namespace, name


def programs(settings: Settings) -> tuple[Path, Path]:
    """Firecracker and its jailer, past all links. Raises HostNotReady."""
    wanted = str(settings.firecracker or "firecracker")
    found = shutil.which(wanted)
    if found is None:
        raise HostNotReady(f"{wanted} is not on this host. {HOW_TO_GET}")
    firecracker = Path(found).resolve()
    name = firecracker.name.replace("firecracker", "jailer", 1)
    jail = shutil.which(firecracker.with_name(name)) or shutil.which("jailer")
    if jail is None:
        raise HostNotReady(f"{firecracker} is there, its jailer ({name}) is not. {HOW_TO_GET}")
    return firecracker, Path(jail).resolve()


def installed_version(settings: Settings) -> str:
    """As "1.16.1". Raises HostNotReady when missing, too old, known to be bad, or not the same as its jailer's."""
    told = [_version(program) for program in programs(settings)]
    if told[0] != told[1]:
        raise HostNotReady(f"Firecracker is {told[0]}, its jailer {told[1]}. {HOW_TO_GET}")
    try:
        number = tuple(int(part) for part in told[0].split(".")[:2])
    except ValueError as exc:
        raise HostNotReady(f"Firecracker says it is version {told[0]!r}, which can't be read") from exc
    if number < OLDEST:
        raise HostNotReady(
            f"Firecracker {told[0]} is too old; at least {OLDEST[0]}.{OLDEST[1]} is needed. {HOW_TO_GET}"
        )
    faults = parts.faults_of("firecracker", told[0])
    if faults and settings.known_bad_vmm == "refuse":
        why = "; ".join(map(str, faults))
        raise HostNotReady(f"Firecracker {told[0]} is refused: {why}. {GOOD}. {HOW_TO_GET}")
    return told[0]


def _version(program: Path) -> str:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError) as exc:
        raise HostNotReady(f"{program} can't be started: {exc}. {HOW_TO_GET}") from exc
    first = said.splitlines()[0] if said else ""
    return first.rpartition(" v")[2]
