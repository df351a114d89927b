"""The QEMU driver: KVM or TCG, microvm machine, control over QMP, agent over virtio-serial.

How saving and restoring works, and what was measured of it: docs/decisions/0001-restore-not-boot.md.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.abc import ByteStream
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from instavm.errors import BootFailed, HostNotReady
from instavm.node.network.addresses import GUEST_MAC
from instavm.node.vmm import pages, tsc
from instavm.node.vmm.base import MachineSpec, Saved
from instavm.node.vmm.process import VMMProcess
from instavm.sandbox import Tier

BINARY = "qemu-system-x86_64"
OLDEST = (7, 2)
TRANSLATION_CACHE_MIB = 64
CONSOLE_BYTES = 1 << 16
QMP_TIMEOUT_S = 10.0

CPU = {"kvm": "host", "tcg": "max,la57=off"}
ACCELERATOR = {"kvm": "kvm", "tcg": f"tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"}
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet reboot=t panic=-1 mitigations=off no_timer_check "
    "psi=0 nowatchdog cgroup.memory=nokmem noautogroup"
)
STATE_FORMAT = "migration.send-configuration=off"
"""States of booted and of restored machines are written by different commands; without this header they read the same."""
# norandmaps: the emulator keeps translated code by virtual address, so a program that is loaded at the same place again
# need not be translated again; 7,000 blocks less for each bash. What it costs: docs/security.md.
TIER_ARGUMENTS = {"kvm": "", "tcg": " norandmaps tsc=reliable clocksource=tsc tsc_early_khz={khz}"}


@dataclass(frozen=True, slots=True)
class Sockets:
    """Descriptors of listening sockets that the VMM inherits: we can dial before it has even started."""

    qmp: int
    agent: int


def machine(spec: MachineSpec, acceleration: str) -> list[str]:
    return [
        *("-M", "microvm,rtc=on,usb=off,suppress-vmdesc=on,memory-backend=ram"),
        *("-accel", ACCELERATOR[acceleration]),
        *("-cpu", CPU[acceleration]),
        *("-smp", str(spec.vcpus)),
        *("-m", f"{spec.memory_mib}M"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-global", STATE_FORMAT),
    ]


def memory(spec: MachineSpec, file: Path, *, share: bool) -> list[str]:
    flag = "on" if share else "off"
    size = f"{spec.memory_mib}M"
    return ["-object", f"memory-backend-file,id=ram,size={size},mem-path={file},share={flag}"]


def disks(spec: MachineSpec, root: Path) -> list[str]:
    return [
        *("-drive", f"if=none,id=system,file={spec.system},format=raw,readonly=on,file.locking=off"),
        *("-device", "virtio-blk-device,drive=system"),
        *(
            "-drive",
            f"if=none,id=root,file={root},format=qcow2,cache=unsafe,discard=unmap,detect-zeroes=unmap,werror=report",
        ),
        *("-device", "virtio-blk-device,drive=root"),
    ]


def network(spec: MachineSpec, tap: int | None) -> list[str]:
    if not spec.network:
        return []
    assert tap is not None, "a machine with a network device needs a tap"
    return [
        *("-netdev", f"tap,id=net,fd={tap},vhost=off"),
        # A restored guest need not tell anybody that it has moved: it would be the first thing that every clone does.
        *("-device", f"virtio-net-device,netdev=net,mac={GUEST_MAC},guest_announce=off"),
    ]


def ports(sockets: Sockets) -> list[str]:
    return [
        *("-chardev", f"socket,id=qmp,fd={sockets.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"ringbuf,id=console,size={CONSOLE_BYTES}"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-device,max_ports=2"),
        *("-chardev", f"socket,id=agent,fd={sockets.agent},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=instavm.agent,nr=1"),
    ]


def kernel_arguments(acceleration: str) -> str:
    return KERNEL_ARGUMENTS + TIER_ARGUMENTS[acceleration].format(khz=tsc.khz())


def boot_arguments(spec: MachineSpec, acceleration: str) -> list[str]:
    append = kernel_arguments(acceleration)
    return ["-kernel", str(spec.kernel), "-initrd", str(spec.initrd), "-append", append]


class QemuMachine:
    def __init__(self, process: VMMProcess, qmp: QMPClient, agent_path: Path, state_fd: int | None) -> None:
        self._process = process
        self._qmp = qmp
        self._agent_path = agent_path
        self._state_fd = state_fd

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.alive

    async def connect(self, control: Path) -> None:
        """Take up the line to QEMU's monitor. Raises BootFailed."""
        try:
            with _deadline("QEMU did not start"):
                await self._qmp.connect(str(control))
        except (QMPError, OSError, EOFError) as exc:
            raise BootFailed(f"QEMU did not start: {self._process.last_words() or exc}") from exc

    async def dial(self) -> ByteStream:
        return await anyio.connect_unix(str(self._agent_path))

    async def load(self, *, background: bool = False) -> None:
        assert self._state_fd is not None, "only a prepared machine can be loaded"
        self._process.in_background(background)
        await self._migrate("migrate-incoming", f"fd:{self._state_fd}")
        await self._execute("cont")

    async def pause(self) -> None:
        await self._execute("stop")

    async def resume(self) -> None:
        self._process.in_background(False)
        await self._execute("cont")

    async def save(self, state: Path) -> None:
        await self._skip_shared_memory()
        fd = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._qmp.send_fd_scm(fd)
            await self._execute("getfd", {"fdname": "state"})
        finally:
            os.close(fd)
        await self._migrate("migrate", "fd:state")

    async def save_changes(self, memory: Path, state: Path, changes: Path) -> None:
        # The command is named after its first user; what it writes is what a migration writes of devices.
        with _created(changes) as into:
            with _created(state) as fd:
                self._qmp.send_fd_scm(fd)
                fdset = (await self._execute("add-fd"))["fdset-id"]
            where = f"/dev/fdset/{fdset}"
            try:
                await self._execute("xen-save-devices-state", {"filename": where, "live": False})
            finally:
                await self._execute("remove-fd", {"fdset-id": fdset})
            await anyio.to_thread.run_sync(pages.save, self.pid, memory, into)

    async def new_layer(self, layer: Path) -> None:
        how: dict[str, object] = {"device": "root", "snapshot-file": str(layer), "format": "qcow2", "mode": "existing"}
        await self._execute("blockdev-snapshot-sync", how)

    async def merge_layers(self, base: Path) -> None:
        with self._qmp.listener(("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")) as events:
            await self._execute("block-stream", {"job-id": "merge", "device": "root", "base": str(base)})
            async for event in events:
                told = cast(dict[str, Any], event["data"])
                if told["device"] == "merge":
                    if event["event"] == "BLOCK_JOB_CANCELLED" or "error" in told:
                        raise BootFailed(f"layers could not be merged: {told.get('error', 'cancelled')}")
                    return

    async def wait(self) -> int:
        return await self._process.wait()

    async def console(self) -> str:
        if not self._process.alive:
            return self._process.last_words()
        try:
            text = await self._execute("ringbuf-read", {"device": "console", "size": CONSOLE_BYTES})
        except BootFailed:
            return self._process.last_words()
        return str(text)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._process.kill()
            await self._hang_up()

    async def detach(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._hang_up()
            self._process.let_go()

    async def _hang_up(self) -> None:
        with suppress(QMPError, OSError, EOFError):  # that the line of one that was killed is broken is no news
            await self._qmp.disconnect()

    async def _skip_shared_memory(self) -> None:
        """Guest memory lives in a file that stays where it is: saved states leave it out."""
        capabilities = [
            {"capability": "x-ignore-shared", "state": True},
            {"capability": "events", "state": True},
        ]
        await self._execute("migrate-set-capabilities", {"capabilities": capabilities})

    async def _migrate(self, command: str, uri: str) -> None:
        with self._qmp.listener("MIGRATION") as events:
            await self._execute(command, {"uri": uri})
            with _deadline(f"{command} did not end"):
                async for event in events:
                    status = cast(dict[str, Any], event["data"])["status"]
                    if status == "completed":
                        return
                    if status in ("failed", "cancelled"):
                        raise BootFailed(f"{command} {status}: {self._process.last_words()}")

    async def _execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        try:
            with _deadline(f"QEMU did not answer {command}"):
                return await self._qmp.execute(command, arguments)
        except (QMPError, OSError, EOFError) as exc:
            raise BootFailed(f"QEMU: {command}: {exc} {self._process.last_words()}".strip()) from exc


class QemuDriver:
    name = "qemu"

    def __init__(self, acceleration: str) -> None:
        self._acceleration = acceleration
        self.tier = Tier.KVM if acceleration == "kvm" else Tier.EMULATED
        self._version: str | None = None

    async def version(self) -> str:
        if self._version is None:
            self._version = await anyio.to_thread.run_sync(installed_version)
        return self._version

    def fingerprint(self) -> str:
        kind = self._acceleration
        kernel = KERNEL_ARGUMENTS + TIER_ARGUMENTS[kind]
        return f"{self.name} {self._version} {ACCELERATOR[kind]} {CPU[kind]} {kernel} {STATE_FORMAT}"

    async def boot(
        self, spec: MachineSpec, disk: Path, memory_file: Path, home: Path, *, tap: int | None = None
    ) -> QemuMachine:
        return await self._spawn(
            home,
            lambda sockets: [
                *machine(spec, self._acceleration),
                *memory(spec, memory_file, share=True),
                *disks(spec, disk),
                *ports(sockets),
                *network(spec, tap),
                *boot_arguments(spec, self._acceleration),
            ],
            tap=tap,
        )

    async def prepare(
        self, saved: Saved, disk: Path, home: Path, *, background: bool, tap: int | None = None
    ) -> QemuMachine:
        state = os.open(saved.state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            made = await self._spawn(
                home,
                lambda sockets: [
                    *machine(saved.spec, self._acceleration),
                    *memory(saved.spec, saved.memory, share=False),
                    *disks(saved.spec, disk),
                    *ports(sockets),
                    *network(saved.spec, tap),
                    *("-incoming", "defer"),
                ],
                state,
                tap=tap,
                background=background,
            )
        finally:
            os.close(state)
        try:
            await made._skip_shared_memory()
            if saved.changes is not None:
                await anyio.to_thread.run_sync(pages.load, made.pid, saved.memory, saved.changes)
        except BaseException:
            await made.aclose()
            raise
        return made

    async def _spawn(
        self,
        home: Path,
        arguments: Callable[[Sockets], list[str]],
        state_fd: int | None = None,
        *,
        tap: int | None = None,
        background: bool = False,
    ) -> QemuMachine:
        with _listening(home / "qmp.sock") as qmp_socket, _listening(home / "agent.sock") as agent_socket:
            sockets = Sockets(qmp_socket.fileno(), agent_socket.fileno())
            fds = [sockets.qmp, sockets.agent, *(fd for fd in (state_fd, tap) if fd is not None)]
            try:
                process = VMMProcess.spawn([BINARY, *arguments(sockets)], log=home / "vmm.log", pass_fds=fds)
            except OSError as exc:
                raise HostNotReady(f"{BINARY} can't be started: {exc}. {_HOW_TO_GET}") from exc
        process.in_background(background)
        made = QemuMachine(process, QMPClient(), home / "agent.sock", state_fd)
        try:
            await made.connect(home / "qmp.sock")
        except BaseException:
            await made.aclose()
            raise
        return made

    async def adopt(self, pid: int, home: Path) -> QemuMachine:
        try:
            process = VMMProcess(pid, home / "vmm.log")
        except ProcessLookupError as exc:
            raise BootFailed(f"process {pid} of {home.name} is gone") from exc
        made = QemuMachine(process, QMPClient(), home / "agent.sock", None)
        try:
            await made.connect(home / "qmp.sock")
        except BaseException:
            await made.aclose()
            raise
        return made


_HOW_TO_GET = "Install it with: apt-get install qemu-system-x86"


def installed_version() -> str:
    """The version of the QEMU on this host, as "7.2.22". Raises HostNotReady when missing or too old."""
    try:
        answer = subprocess.run([BINARY, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        raise HostNotReady(f"{BINARY} can't be started: {exc}. {_HOW_TO_GET}") from exc
    version = answer.stdout.split("version ", 1)[-1].split()[0]
    try:
        number = tuple(int(part) for part in version.split(".")[:2])
    except ValueError as exc:
        raise HostNotReady(f"{BINARY} says it is version {version!r}, which can't be read") from exc
    if number < OLDEST:
        raise HostNotReady(f"QEMU {version} is too old; at least {OLDEST[0]}.{OLDEST[1]} is needed. {_HOW_TO_GET}")
    return version


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(path))
        except OSError as exc:
            raise HostNotReady(f"can't make the socket {path}: {exc}; is INSTAVM_STATE_DIR too long or full?") from exc
        path.chmod(0o600)
        listener.listen(1)
        yield listener


@contextmanager
def _created(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _deadline(what: str) -> Iterator[None]:
    try:
        with anyio.fail_after(QMP_TIMEOUT_S):
            yield
    except TimeoutError as exc:
        raise BootFailed(f"{what} within {QMP_TIMEOUT_S:.0f} s") from exc
