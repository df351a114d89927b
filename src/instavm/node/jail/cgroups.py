"""Control groups of VMMs, on hosts with version 2, version 1, or (as often) some controllers on each.

One group per machine, named after its folder, in a group of its server's, named after its state directory: so what a killed
server left is known by where it lies. A limit that this host has no controller for is left out, and the isolation report says so.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instavm.errors import HostNotReady

CONTROLLERS = ("cpu", "memory", "pids", "io")
PERIOD_US = 100_000
EMULATOR_CPUS = 0.5
"""What a VMM may use beyond its vCPUs: its own threads, which emulate devices and answer the server."""
EMULATOR_MIB = 256
"""What a VMM may use beyond the guest's memory: 64 for translated code, the rest is room; some 100 were seen in use."""
TASKS = 160
"""Threads of one VMM: vCPUs, its main loop, and up to 64 for its disks."""
TOGETHER_SHARES = 2
"""How much CPU all sandboxes together weigh against one other process at the root, in multiples of it."""
EMPTY_S = 2.0
WAITS = ("bwrap",)
REAPED_S = 0.5
"""How long a jailer may take to notice that what it waits for has ended; it needs a millisecond."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one machine may take of its host. Bytes and operations are per second, of each device."""

    vcpus: int
    memory_mib: int
    io_bytes: int
    io_operations: int

    @property
    def cpus(self) -> float:
        return self.vcpus + EMULATOR_CPUS

    @property
    def memory_bytes(self) -> int:
        """The guest's memory twice: a page that its template had not touched is counted once in the template's sealed
        memory, by whoever touches it first, and once as the sandbox's own copy."""
        return 2 * self.memory_mib + EMULATOR_MIB << 20


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted tree of groups, and which of our controllers live in it."""

    mount: Path
    version: int
    controllers: tuple[str, ...]


def hierarchies(mounts: str | None = None) -> list[Hierarchy]:
    """Where this host's controllers are, from /proc/self/mountinfo. A controller is in one tree only."""
    found = []
    for line in (mounts if mounts is not None else Path("/proc/self/mountinfo").read_text()).splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        place = Path(before.split()[4])
        if kind == "cgroup2":
            there = (place / "cgroup.controllers").read_text().split()
            found.append(Hierarchy(place, 2, tuple(name for name in CONTROLLERS if name in there)))
        elif kind == "cgroup":
            names = options.split(",")
            ours = tuple(name for name in CONTROLLERS if ("blkio" if name == "io" else name) in names)
            found.append(Hierarchy(place, 1, ours))
    return [one for one in found if one.controllers]


class Cgroups:
    """The groups of one server's machines."""

    def __init__(self, state_dir: Path, trees: list[Hierarchy] | None = None) -> None:
        self._trees = hierarchies() if trees is None else trees
        self._name = f"instavm-{hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:12]}"
        self._device = _device(state_dir)

    @property
    def controllers(self) -> dict[str, int]:
        """Controller → the version of the tree it is in."""
        return {name: tree.version for tree in self._trees for name in tree.controllers}

    def open(self) -> None:
        """Make what the groups of machines lie in. Raises HostNotReady."""
        for tree in self._trees:
            try:
                all_of_ours = tree.mount / self._name
                all_of_ours.mkdir(exist_ok=True)
                if tree.version == 2:
                    enable = " ".join(f"+{name}" for name in tree.controllers)
                    for place in (tree.mount, all_of_ours):
                        (place / "cgroup.subtree_control").write_text(enable)
                if "cpu" in tree.controllers:
                    _weigh(tree, all_of_ours, TOGETHER_SHARES)
            except OSError as exc:
                raise HostNotReady(
                    f"{exc.filename}: control groups can't be made ({exc.strerror}); the server needs to be root"
                    " with cgroups of its own to write, or INSTAVM_JAIL=off (sandboxes are then not confined)"
                ) from exc

    def close(self) -> None:
        """Remove the server's own groups, unless machines were left in them."""
        for tree in self._trees:
            with contextlib.suppress(OSError):
                (tree.mount / self._name).rmdir()

    def make(self, machine: str, limits: Limits) -> None:
        """A group with its limits; nothing is in it yet. Raises OSError."""
        for tree in self._trees:
            group = self._group(tree, machine)
            group.mkdir()
            for name, value in settings_of(tree, limits, self._device):
                (group / name).write_text(value)

    def put(self, machine: str, pid: int) -> None:
        """Have a process, and all that it starts, live within the machine's limits. Raises OSError."""
        for tree in self._trees:
            (self._group(tree, machine) / "cgroup.procs").write_text(str(pid))

    def idle(self, machine: str, idle: bool, vcpus: int) -> None:
        """Whether it runs only when nothing else wants the CPU."""
        for tree in self._trees:
            group = self._group(tree, machine)
            if "cpu" in tree.controllers and (group / "cpu.idle").exists():
                (group / "cpu.idle").write_text(str(int(idle)))
                if not idle:
                    _weigh(tree, group, vcpus)

    def vcpus(self, machine: str) -> int:
        """What its limit was made for; 1 when it has none."""
        for tree, group in self._with("cpu", machine):
            with contextlib.suppress(FileNotFoundError):
                said = (group / ("cpu.max" if tree.version == 2 else "cpu.cfs_quota_us")).read_text()
                return round(int(said.split()[0]) / PERIOD_US - EMULATOR_CPUS)
        return 1

    def end(self, machine: str) -> None:
        """End whatever lives in a machine's groups: what waits for another one's end last, so that it can reap it."""
        for tree in self._trees:
            members = self._group(tree, machine) / "cgroup.procs"
            with contextlib.suppress(FileNotFoundError):
                listed = members.read_text().split()
                _kill(members, [pid for pid in listed if not _waits(pid)])
                deadline = time.monotonic() + REAPED_S
                while (left := members.read_text().split()) and time.monotonic() < deadline:
                    time.sleep(0.005)
                _kill(members, left)

    def remove(self, machine: str) -> None:
        """Once its processes are gone. Twice is fine."""
        for tree in self._trees:
            group = self._group(tree, machine)
            deadline = time.monotonic() + EMPTY_S
            while True:
                try:
                    group.rmdir()
                except FileNotFoundError:
                    break
                except OSError as exc:
                    if exc.errno != errno.EBUSY or time.monotonic() > deadline:
                        raise
                    time.sleep(0.005)  # the kernel takes its time with a process that has been reaped
                    continue
                break

    def machines(self) -> frozenset[str]:
        """Machines of this server that have a group."""
        return frozenset(
            entry.name
            for tree in self._trees
            if (tree.mount / self._name).is_dir()
            for entry in os.scandir(tree.mount / self._name)
            if entry.is_dir()
        )

    def over_memory(self, machine: str) -> bool:
        """Whether the kernel ended something of it for using more memory than it may."""
        for tree, group in self._with("memory", machine):
            name = "memory.events" if tree.version == 2 else "memory.oom_control"
            with contextlib.suppress(OSError):
                return int(_fields(group / name).get("oom_kill", "0")) > 0
        return False

    def read(self, machine: str) -> dict[str, str]:
        """The limits as they stand in the kernel now: file → content."""
        told = {}
        for tree in self._trees:
            group = self._group(tree, machine)
            for name in _FILES[tree.version]:
                with contextlib.suppress(FileNotFoundError):
                    told[name] = " ".join((group / name).read_text().split())
        return told

    def paths(self, machine: str) -> dict[str, str]:
        """Controller → where the group is."""
        return {name: str(self._group(tree, machine)) for tree in self._trees for name in tree.controllers}

    def _group(self, tree: Hierarchy, machine: str) -> Path:
        return tree.mount / self._name / machine

    def _with(self, controller: str, machine: str) -> Iterator[tuple[Hierarchy, Path]]:
        return ((tree, self._group(tree, machine)) for tree in self._trees if controller in tree.controllers)


def _waits(pid: str) -> bool:
    """Whether it is the jailer of another process, and ends with it."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name in WAITS
    except OSError:
        return False


def _kill(members: Path, pids: list[str]) -> None:
    """A number is only signalled while the kernel lists it there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(int(pid))
            try:
                if pid in members.read_text().split():
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            finally:
                os.close(pidfd)


_FILES = {
    2: ("cpu.max", "cpu.weight", "memory.max", "memory.oom.group", "pids.max", "io.max"),
    1: (
        *("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares", "memory.limit_in_bytes", "pids.max"),
        *(f"blkio.throttle.{way}_{what}_device" for way in ("read", "write") for what in ("bps", "iops")),
    ),
}


def settings_of(tree: Hierarchy, limits: Limits, device: str | None) -> Iterator[tuple[str, str]]:
    """What is written into which file of a machine's group, in order."""
    quota = str(int(limits.cpus * PERIOD_US))
    new = tree.version == 2
    if "cpu" in tree.controllers:
        if new:
            yield "cpu.max", f"{quota} {PERIOD_US}"
            yield "cpu.weight", str(_weight(tree, limits.vcpus))
        else:
            yield "cpu.cfs_period_us", str(PERIOD_US)
            yield "cpu.cfs_quota_us", quota
            yield "cpu.shares", str(_weight(tree, limits.vcpus))
    if "memory" in tree.controllers:
        yield "memory.max" if new else "memory.limit_in_bytes", str(limits.memory_bytes)
        if new:
            yield "memory.oom.group", "1"
    if "pids" in tree.controllers:
        yield "pids.max", str(TASKS)
    if "io" in tree.controllers and device is not None:
        rate, operations = limits.io_bytes, limits.io_operations
        if new:
            yield "io.max", f"{device} rbps={rate} wbps={rate} riops={operations} wiops={operations}"
        else:
            for way in ("read", "write"):
                yield f"blkio.throttle.{way}_bps_device", f"{device} {rate}"
                yield f"blkio.throttle.{way}_iops_device", f"{device} {operations}"


def _weight(tree: Hierarchy, times: int) -> int:
    return 100 * times if tree.version == 2 else 1024 * times


def _weigh(tree: Hierarchy, group: Path, times: int) -> None:
    (group / ("cpu.weight" if tree.version == 2 else "cpu.shares")).write_text(str(_weight(tree, times)))


def _fields(path: Path) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in path.read_text().splitlines())


def _device(folder: Path) -> str | None:
    """The whole disk that `folder` lies on, as "major:minor"; None when it is on none (tmpfs, overlay, network)."""
    number = folder.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not node.exists():
        return None
    whole = node.resolve()
    if (whole / "partition").exists():
        whole = whole.parent
    return (whole / "dev").read_text().strip()
