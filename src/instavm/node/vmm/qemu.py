"""The QEMU driver: KVM or TCG, microvm machine, control over QMP, agent over virtio-serial.

How saving and restoring works, and what was measured of it: docs/decisions/0001-restore-not-boot.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import ByteStream

from instavm.contract.isolation import Tier
from instavm.errors import BootFailed, HostNotReady
from instavm.node.jail.jail import Jails, Needs
from instavm.node.network.addresses import GUEST_MAC
from instavm.node.vmm import blocks, pages, processor, tsc
from instavm.node.vmm.base import HARDWARE, MachineSpec, Saved
from instavm.node.vmm.line import Line
from instavm.node.vmm.memory import Memories, sealed
from instavm.node.vmm.monitor import Monitor, listening
from instavm.node.vmm.process import OneProcess, VMMProcess

BINARY = "qemu-system-x86_64"
OLDEST, NOT_YET = (7, 2), (11, 0)
"""From the second one on (seen: 11.1.3) QEMU saves no state to a descriptor of a file, which is all that one in a jail has."""
STOPPED = "-S"
"""Until it is told to run. One that runs at once says so on its monitor, and may say it ahead of the greeting."""
TRANSLATION_CACHE_MIB = 64
CONSOLE_BYTES = 1 << 16

CPU = {"kvm": "host,svm=off,vmx=off", "tcg": "max,la57=off,svm=off,vmx=off"}
"""No virtualization within the guest: a processor's emulation of it is where most holes of KVM are, and nobody needs it."""
CPU_OF_REVISION_1 = {"kvm": "host", "tcg": "max,la57=off"}
SYSTEM_DEVICE = "virtio-blk-device,drive=system,scsi=off,config-wce=off,discard=off,write-zeroes=off"
ROOT_DEVICE = "virtio-blk-device,drive=root,scsi=off,config-wce=off,discard=on,write-zeroes=off"
"""All that a guest can ask of its disks is said outright. discard: what its `fstrim` gives back is the host's again."""
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


def cpu(acceleration: str, hardware: int = HARDWARE) -> str:
    return (CPU_OF_REVISION_1 if hardware == 1 else CPU)[acceleration]


def machine(spec: MachineSpec, acceleration: str) -> list[str]:
    return [
        # guests' memory is not offered to the host's search for equal pages, which tells others what is in them
        *("-M", "microvm,rtc=on,usb=off,suppress-vmdesc=on,memory-backend=ram,mem-merge=off,dump-guest-core=off"),
        *("-accel", ACCELERATOR[acceleration]),
        *("-cpu", cpu(acceleration, spec.hardware)),
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


def disks(spec: MachineSpec, root: Path, layers: Sequence[Path], given: Descriptors) -> list[str]:
    """The system image, and the root disk: an overlay in the machine's folder on `layers`, which are only read."""
    if spec.hardware == 1:
        system_device, root_device = "virtio-blk-device,drive=system,scsi=off", "virtio-blk-device,drive=root,scsi=off"
    else:
        system_device, root_device = SYSTEM_DEVICE, ROOT_DEVICE
    return [
        *blocks.added((given.system, *given.layers)),
        *("-drive", "if=none,id=system,file=/dev/fdset/1,format=raw,readonly=on,file.locking=off"),
        *("-device", system_device),
        *blocks.root_drive(root, layers, 2),
        *("-device", root_device),
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


class QemuMachine(OneProcess):
    def __init__(self, process: VMMProcess, agent_path: Path, state_fd: int | None) -> None:
        super().__init__(process)
        self._monitor = Monitor(process.last_words)
        self._agent_path = agent_path
        self._state_fd = state_fd

    async def connect(self, control: Path) -> None:
        """Take up the line to QEMU's monitor. Raises BootFailed."""
        await self._monitor.connect(control)

    async def dial(self) -> ByteStream:
        return await Line.dial(self._agent_path)

    async def load(self, *, background: bool = False) -> None:
        assert self._state_fd is not None, "only a prepared machine can be loaded"
        self._process.in_background(background)
        await self._monitor.migrate("migrate-incoming", f"fd:{self._state_fd}")
        await self._monitor.execute("cont")

    async def pause(self) -> None:
        await self._monitor.execute("stop")

    async def resume(self) -> None:
        self._process.in_background(False)
        await self._monitor.execute("cont")

    async def save(self, state: Path) -> None:
        await self._skip_shared_memory()
        fd = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._monitor.send_fd(fd)
            await self._monitor.execute("getfd", {"fdname": "state"})
        finally:
            os.close(fd)
        await self._monitor.migrate("migrate", "fd:state")

    async def save_changes(self, memory: Path, state: Path, changes: Path) -> None:
        # The command is named after its first user; what it writes is what a migration writes of devices.
        with pages.created(changes) as into:
            with pages.created(state) as fd:
                self._monitor.send_fd(fd)
                fdset = (await self._monitor.execute("add-fd"))["fdset-id"]
            where = f"/dev/fdset/{fdset}"
            try:
                await self._monitor.execute("xen-save-devices-state", {"filename": where, "live": False})
            finally:
                await self._monitor.execute("remove-fd", {"fdset-id": fdset})
            await anyio.to_thread.run_sync(pages.save, self.pid, memory, into)

    async def new_layer(self, layer: Path) -> None:
        self._process.cage.own(layer)
        await self._monitor.new_layer(layer)

    async def merge_layers(self, base: Path) -> None:
        await self._monitor.merge_layers(blocks.node(base), base)

    async def console(self) -> str:
        if not self._process.alive:
            return self._process.last_words()
        try:
            text = await self._monitor.execute("ringbuf-read", {"device": "console", "size": CONSOLE_BYTES})
        except BootFailed:
            return self._process.last_words()
        return str(text)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._process.kill()
            await self._monitor.hang_up()

    async def detach(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._monitor.hang_up()
            self._process.let_go()

    async def _skip_shared_memory(self) -> None:
        """Guest memory lives in a file that stays where it is: saved states leave it out."""
        capabilities = [
            {"capability": "x-ignore-shared", "state": True},
            {"capability": "events", "state": True},
        ]
        await self._monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


class QemuDriver:
    name = "qemu"

    def __init__(self, acceleration: str, jails: Jails, *, huge_pages: bool = False) -> None:
        self._acceleration = acceleration
        self._jails = jails
        self._memories = Memories(huge_pages=huge_pages)
        self.tier = Tier.KVM if acceleration == "kvm" else Tier.EMULATED
        self._version: str | None = None

    async def version(self) -> str:
        if self._version is None:
            self._version = await anyio.to_thread.run_sync(installed_version)
        return self._version

    def fingerprint(self, hardware: int = HARDWARE) -> str:
        kind = self._acceleration
        kernel = KERNEL_ARGUMENTS + TIER_ARGUMENTS[kind]
        devices = "" if hardware == 1 else f" {SYSTEM_DEVICE} {ROOT_DEVICE}"
        return f"{self.name} {self._version} {ACCELERATOR[kind]} {cpu(kind, hardware)} {kernel} {STATE_FORMAT}{devices}"

    def processor(self) -> str:
        return processor.host()

    def close(self) -> None:
        self._memories.close()

    async def boot(self, saved: Saved, disk: Path, home: Path, *, tap: int | None = None) -> QemuMachine:
        with saved.memory.open("xb") as file:
            os.ftruncate(file.fileno(), saved.spec.memory_mib << 20)
        with ExitStack() as opened:
            kernel, initrd = (held(sealed(file), opened) for file in (saved.spec.kernel, saved.spec.initrd))
            given = self._give(saved, home, opened, kernel=kernel, initrd=initrd, tap=tap)
            arguments = [
                *machine(saved.spec, self._acceleration),
                *memory(saved.spec, str(saved.memory), share=True),
                *disks(saved.spec, disk, saved.layers, given),
                *ports(given),
                *network(saved.spec, tap),
                *boot_arguments(given, self._acceleration),
                STOPPED,
            ]
            made = await self._spawn(arguments, saved, given, opened, home, (disk, saved.memory))
        try:
            await made.resume()
        except BaseException:
            await made.aclose()
            raise
        return made

    async def prepare(
        self, saved: Saved, disk: Path, home: Path, *, background: bool, tap: int | None = None
    ) -> QemuMachine:
        with ExitStack() as opened:
            copy = held(await anyio.to_thread.run_sync(self._memories.get, saved.memory), opened)
            state = reading(saved.state, opened)
            given = self._give(saved, home, opened, memory=copy, state=state, tap=tap)
            arguments = [
                *machine(saved.spec, self._acceleration),
                *memory(saved.spec, f"/proc/self/fd/{copy}", share=False),
                *disks(saved.spec, disk, saved.layers, given),
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
            qmp=opened.enter_context(listening(home / "qmp.sock")).fileno(),
            agent=opened.enter_context(listening(home / "agent.sock")).fileno(),
            system=reading(saved.spec.system, opened),
            layers=tuple(reading(layer, opened) for layer in saved.layers),
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
            process = await VMMProcess.spawn(
                lambda output: self._jails.start([binary(), *arguments], needs, output), log=home / "vmm.log"
            )
        except OSError as exc:
            raise HostNotReady(f"{BINARY} can't be started: {exc}. {HOW_TO_GET}") from exc
        opened.close()  # from here on only the VMM holds its sockets: when it is gone, nobody waits for an answer
        made = QemuMachine(process, home / "agent.sock", given.state)
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
        made = QemuMachine(process, home / "agent.sock", None)
        try:
            await made.connect(home / "qmp.sock")
        except BaseException:
            await made.aclose()
            raise
        return made


HOW_TO_GET = "Install it with: apt-get install qemu-system-x86"


def binary() -> str:
    """Where QEMU is, past all links. Raises HostNotReady."""
    found = shutil.which(BINARY)
    if found is None:
        raise HostNotReady(f"{BINARY} is not on this host. {HOW_TO_GET}")
    return str(Path(found).resolve())


def installed_version() -> str:
    """The version of the QEMU on this host, as "7.2.22". Raises HostNotReady when missing or too old."""
    try:
        answer = subprocess.run([BINARY, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        raise HostNotReady(f"{BINARY} can't be started: {exc}. {HOW_TO_GET}") from exc
    version = answer.stdout.split("version ", 1)[-1].split()[0]
    try:
        number = tuple(int(part) for part in version.split(".")[:2])
    except ValueError as exc:
        raise HostNotReady(f"{BINARY} says it is version {version!r}, which can't be read") from exc
    if number < OLDEST:
        raise HostNotReady(f"QEMU {version} is too old; at least {OLDEST[0]}.{OLDEST[1]} is needed. {HOW_TO_GET}")
    if number >= NOT_YET:
        raise HostNotReady(f"QEMU {version} is too new; one before {NOT_YET[0]}.{NOT_YET[1]} is needed. {HOW_TO_GET}")
    return version


def reading(path: Path, opened: ExitStack) -> int:
    return held(os.open(path, os.O_RDONLY | os.O_CLOEXEC), opened)


def held(fd: int, opened: ExitStack) -> int:
    opened.callback(os.close, fd)
    return fd
