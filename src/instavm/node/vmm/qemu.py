"""The QEMU driver: KVM or TCG, microvm machine, control over QMP, agent over virtio-serial.

How saving and restoring works, and what was measured of it: docs/decisions/0001-restore-not-boot.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import anyio
from anyio.abc import ByteStream
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from instavm.errors import BootFailed, HostNotReady
from instavm.node.jail.jail import Jails, Needs
from instavm.node.network.addresses import GUEST_MAC
from instavm.node.vmm import pages, tsc
from instavm.node.vmm.base import MachineSpec, Saved
from instavm.node.vmm.memory import Memories, sealed
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
class Descriptors:
    """All that the VMM inherits. It opens no file by name but those of its own folder: what it may read is given to it.

    qmp, agent: listening sockets, so that we can dial before it has even started.
    """

    qmp: int
    agent: int
    system: int
    layers: tuple[int, ...]
    memory: int | None = None
    state: int | None = None
    kernel: int | None = None
    initrd: int | None = None
    tap: int | None = None

    def all(self) -> tuple[int, ...]:
        some = (self.memory, self.state, self.kernel, self.initrd, self.tap)
        given = (self.qmp, self.agent, self.system, *self.layers, *some)
        return tuple(fd for fd in given if fd is not None)


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


def memory(spec: MachineSpec, file: str, *, share: bool) -> list[str]:
    flag = "on" if share else "off"
    size = f"{spec.memory_mib}M"
    return ["-object", f"memory-backend-file,id=ram,size={size},mem-path={file},share={flag}"]


def disks(root: Path, layers: Sequence[Path], given: Descriptors) -> list[str]:
    """The system image, and the root disk: an overlay in the machine's folder on `layers`, which are only read."""
    files = [*((fd, f"/dev/fdset/{number}") for number, fd in enumerate((given.system, *given.layers), 1))]
    backing = "".join(
        _layer(depth, layer, file, len(layers))
        for depth, (layer, (_, file)) in enumerate(zip(layers, files[1:], strict=True), 1)
    )
    return [
        *(argument for number, (fd, _) in enumerate(files, 1) for argument in ("-add-fd", f"fd={fd},set={number}")),
        *("-drive", f"if=none,id=system,file={files[0][1]},format=raw,readonly=on,file.locking=off"),
        *("-device", "virtio-blk-device,drive=system"),
        *(
            "-drive",
            f"if=none,id=root,driver=qcow2,file.driver=file,file.filename={root},cache=unsafe,discard=unmap,"
            f"detect-zeroes=unmap,werror=report{backing}",
        ),
        *("-device", "virtio-blk-device,drive=root"),
    ]


def _layer(depth: int, layer: Path, file: str, depths: int) -> str:
    """Options of one layer under the root disk; the deepest is a plain image, the others are overlays themselves."""
    at = ".".join(["backing"] * depth)
    kind = "raw" if depth == depths else "qcow2"
    name = f"{at}.node-name={_node(layer)}"
    return f",{at}.driver={kind},{name},{at}.file.driver=file,{at}.file.filename={file},{at}.file.locking=off"


def _node(layer: Path) -> str:
    """What a layer is called in QEMU, which knows it by a descriptor and not by its path."""
    return "layer-" + hashlib.sha256(os.fsencode(layer)).hexdigest()[:24]


def network(spec: MachineSpec, tap: int | None) -> list[str]:
    if not spec.network:
        return []
    assert tap is not None, "a machine with a network device needs a tap"
    return [
        *("-netdev", f"tap,id=net,fd={tap},vhost=off"),
        # A restored guest need not tell anybody that it has moved: it would be the first thing that every clone does.
        *("-device", f"virtio-net-device,netdev=net,mac={GUEST_MAC},guest_announce=off"),
    ]


def ports(given: Descriptors) -> list[str]:
    return [
        *("-chardev", f"socket,id=qmp,fd={given.qmp},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *("-chardev", f"ringbuf,id=console,size={CONSOLE_BYTES}"),
        *("-serial", "chardev:console"),
        *("-device", "virtio-serial-device,max_ports=2"),
        *("-chardev", f"socket,id=agent,fd={given.agent},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=instavm.agent,nr=1"),
    ]


def kernel_arguments(acceleration: str) -> str:
    return KERNEL_ARGUMENTS + TIER_ARGUMENTS[acceleration].format(khz=tsc.khz())


def boot_arguments(given: Descriptors, acceleration: str) -> list[str]:
    append = kernel_arguments(acceleration)
    return ["-kernel", f"/proc/self/fd/{given.kernel}", "-initrd", f"/proc/self/fd/{given.initrd}", "-append", append]


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
        if (uid := self._process.cage.uid) is not None:
            os.chown(layer, uid, uid)
        how: dict[str, object] = {"device": "root", "snapshot-file": str(layer), "format": "qcow2", "mode": "existing"}
        await self._execute("blockdev-snapshot-sync", how)

    async def merge_layers(self, base: Path) -> None:
        how: dict[str, object] = {
            "job-id": "merge",
            "device": "root",
            "base-node": _node(base),
            "backing-file": str(base),
        }
        with self._qmp.listener(("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")) as events:
            await self._execute("block-stream", how)
            async for event in events:
                told = cast(dict[str, Any], event["data"])
                if told["device"] == "merge":
                    if event["event"] == "BLOCK_JOB_CANCELLED" or "error" in told:
                        raise BootFailed(f"layers could not be merged: {told.get('error', 'cancelled')}")
                    return

    @property
    def over_memory(self) -> bool:
        return self._process.cage.over_memory

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

    def __init__(self, acceleration: str, jails: Jails) -> None:
        self._acceleration = acceleration
        self._jails = jails
        self._memories = Memories()
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

    def close(self) -> None:
        self._memories.close()

    async def boot(self, saved: Saved, disk: Path, home: Path, *, tap: int | None = None) -> QemuMachine:
        with saved.memory.open("xb") as file:
            os.ftruncate(file.fileno(), saved.spec.memory_mib << 20)
        with ExitStack() as opened:
            kernel, initrd = (_held(sealed(file), opened) for file in (saved.spec.kernel, saved.spec.initrd))
            given = self._give(saved, home, opened, kernel=kernel, initrd=initrd, tap=tap)
            arguments = [
                *machine(saved.spec, self._acceleration),
                *memory(saved.spec, str(saved.memory), share=True),
                *disks(disk, saved.layers, given),
                *ports(given),
                *network(saved.spec, tap),
                *boot_arguments(given, self._acceleration),
            ]
            return await self._spawn(arguments, saved, given, opened, home, (disk, saved.memory))

    async def prepare(
        self, saved: Saved, disk: Path, home: Path, *, background: bool, tap: int | None = None
    ) -> QemuMachine:
        with ExitStack() as opened:
            held = _held(await anyio.to_thread.run_sync(self._memories.get, saved.memory), opened)
            state = _reading(saved.state, opened)
            given = self._give(saved, home, opened, memory=held, state=state, tap=tap)
            arguments = [
                *machine(saved.spec, self._acceleration),
                *memory(saved.spec, f"/proc/self/fd/{held}", share=False),
                *disks(disk, saved.layers, given),
                *ports(given),
                *network(saved.spec, tap),
                *("-incoming", "defer"),
            ]
            made = await self._spawn(arguments, saved, given, opened, home, (disk,), background=background)
        try:
            await made._skip_shared_memory()
            if saved.changes is not None:
                await anyio.to_thread.run_sync(pages.load, made.pid, saved.memory, saved.changes)
        except BaseException:
            await made.aclose()
            raise
        return made

    def _give(self, saved: Saved, home: Path, opened: ExitStack, **more: int | None) -> Descriptors:
        return Descriptors(
            qmp=opened.enter_context(_listening(home / "qmp.sock")).fileno(),
            agent=opened.enter_context(_listening(home / "agent.sock")).fileno(),
            system=_reading(saved.spec.system, opened),
            layers=tuple(_reading(layer, opened) for layer in saved.layers),
            **more,
        )

    async def _spawn(
        self,
        arguments: Sequence[str],
        saved: Saved,
        given: Descriptors,
        opened: ExitStack,
        home: Path,
        writable: tuple[Path, ...],
        *,
        background: bool = False,
    ) -> QemuMachine:
        spec, kvm = saved.spec, self._acceleration == "kvm"
        needs = Needs(home, spec.vcpus, spec.memory_mib, writable, given.all(), kvm)
        try:
            process = await VMMProcess.spawn([_binary(), *arguments], self._jails, needs, log=home / "vmm.log")
        except OSError as exc:
            raise HostNotReady(f"{BINARY} can't be started: {exc}. {_HOW_TO_GET}") from exc
        opened.close()  # from here on only the VMM holds its sockets: when it is gone, nobody waits for an answer
        made = QemuMachine(process, QMPClient(), home / "agent.sock", given.state)
        try:
            process.in_background(background)
            await made.connect(home / "qmp.sock")
        except BaseException:
            await made.aclose()
            raise
        return made

    async def adopt(self, pid: int, home: Path) -> QemuMachine:
        try:
            process = VMMProcess.adopt(pid, self._jails, home, log=home / "vmm.log")
        except (ProcessLookupError, FileNotFoundError) as exc:
            raise BootFailed(f"process {pid} of {home.name} is gone") from exc
        made = QemuMachine(process, QMPClient(), home / "agent.sock", None)
        try:
            await made.connect(home / "qmp.sock")
        except BaseException:
            await made.aclose()
            raise
        return made


_HOW_TO_GET = "Install it with: apt-get install qemu-system-x86"


def _binary() -> str:
    """Where QEMU is, past all links. Raises HostNotReady."""
    found = shutil.which(BINARY)
    if found is None:
        raise HostNotReady(f"{BINARY} is not on this host. {_HOW_TO_GET}")
    return str(Path(found).resolve())


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


def _reading(path: Path, opened: ExitStack) -> int:
    return _held(os.open(path, os.O_RDONLY | os.O_CLOEXEC), opened)


def _held(fd: int, opened: ExitStack) -> int:
    opened.callback(os.close, fd)
    return fd


@contextmanager
def _created(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


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
def _deadline(what: str) -> Iterator[None]:
    try:
        with anyio.fail_after(QMP_TIMEOUT_S):
            yield
    except TimeoutError as exc:
        raise BootFailed(f"{what} within {QMP_TIMEOUT_S:.0f} s") from exc
