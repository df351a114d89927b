"""What the agent sets up around the user's world: control groups, and who this sandbox is."""

from __future__ import annotations

import os
import signal
import socket
import time

from instavm_guest import kernel
from instavm_guest.frames import Message
from instavm_guest.spawner import IDENTITY_DIR, IDENTITY_FILES

USER_ROOT = "/sandbox"
"""Where the agent sees the root of the user's world."""
CGROUPS = "/sys/fs/cgroup"
USER = f"{CGROUPS}/user"
AGENT_RESERVE = 24 << 20
"""Bytes of memory that the user's processes can't have, so that the agent can always answer."""
PIDS_MAX = 4096
"""Tasks of the user's in all; one call may have half of it, so that its bomb leaves room for the next call."""
DISK_FULL_BYTES = 1 << 20
WIRE = "/sys/class/net/eth0"
HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 "


def set_up() -> None:
    """Control groups for agent and user. Raises OSError."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    os.makedirs(CGROUPS, exist_ok=True)
    if not os.path.exists(f"{CGROUPS}/cgroup.procs"):
        kernel.mount("cgroup2", CGROUPS, "cgroup2")
    os.makedirs(f"{CGROUPS}/agent", exist_ok=True)
    _write(f"{CGROUPS}/agent/cgroup.procs", str(os.getpid()))
    _write(f"{CGROUPS}/cgroup.subtree_control", "+memory +pids")
    _write(f"{CGROUPS}/agent/memory.min", "max")  # its code is page cache too, and must not be pushed out
    os.makedirs(USER, exist_ok=True)
    _write(f"{USER}/cgroup.subtree_control", "+memory +pids")
    _write(f"{USER}/memory.max", str(memory_bytes() - AGENT_RESERVE))
    _write(f"{USER}/pids.max", str(tasks_max()))


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def tasks_max() -> int:
    """One for each MiB: a process takes some 100 KiB of the kernel's own memory, which no group is charged for."""
    return min(PIDS_MAX, memory_bytes() >> 20)


class Identity:
    """Who this sandbox is: clock, entropy, names.

    Everything it needs is open before the template is saved: right after a restore each new path through kernel and
    interpreter costs time, since an emulator has to translate it first.
    """

    def __init__(self) -> None:
        os.makedirs(IDENTITY_DIR, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        named = [name for name in IDENTITY_FILES if name != "resolv.conf"]  # that one is the same in every sandbox
        self._files = {name: os.open(f"{IDENTITY_DIR}/{name}", flags, 0o644) for name in named}
        self._random = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
        self._wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM) if os.path.exists(WIRE) else None
        self._lengths = dict.fromkeys(named, 0)

    def take(self, message: Message) -> None:
        """Become someone of one's own. Raises OSError, KeyError or ValueError; then nobody may run.

        message: `time_ns` since the epoch, `entropy` hex of at least 32 bytes, `hostname`, `machine_id`, `boot_id`, `mac` in hex.
        """
        entropy = bytes.fromhex(message["entropy"])
        if len(entropy) < 32:
            raise ValueError("at least 32 bytes of entropy are needed")
        kernel.reseed(self._random, entropy)
        if self._wire is not None:
            kernel.set_mac(self._wire, os.path.basename(WIRE), bytes.fromhex(message["mac"]))
        self._write("machine-id", message["machine_id"] + "\n")
        self._write("boot_id", message["boot_id"] + "\n")
        self.name(message)

    def name(self, message: Message) -> None:
        """Only clock and name, of one that has all the rest. Raises OSError, KeyError or TypeError; then nobody may run.

        message: `time_ns` since the epoch, `hostname`.
        """
        set_clock(message["time_ns"])
        hostname = message["hostname"]
        socket.sethostname(hostname)
        self._write("hostname", hostname + "\n")
        self._write("hosts", HOSTS + hostname + "\n")

    def _write(self, name: str, text: str) -> None:
        data = text.encode()
        os.pwrite(self._files[name], data, 0)
        if len(data) != self._lengths[name]:
            os.ftruncate(self._files[name], len(data))
            self._lengths[name] = len(data)


def set_clock(time_ns: int) -> None:
    """Raises OSError, TypeError."""
    time.clock_settime_ns(time.CLOCK_REALTIME, time_ns)


class Cgroup:
    """A control group for one program and everything it starts."""

    def __init__(self, name: str) -> None:
        self.path = f"{USER}/{name}"
        os.makedirs(self.path, exist_ok=True)
        _write(f"{self.path}/pids.max", str(tasks_max() // 2))
        self._seen = {"oom": 0, "pids": 0}

    def open_procs(self) -> int:
        return os.open(f"{self.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def kill(self) -> None:
        _write(f"{self.path}/cgroup.kill", "1")

    def refused(self) -> str | None:
        """Which limit was hit since this was last asked: "oom" (the kernel killed for memory), "pids", or None."""
        now = {"oom": self._count("memory.events", "oom_kill"), "pids": self._count("pids.events", "max")}
        hit = next((name for name, count in now.items() if count > self._seen[name]), None)
        self._seen = now
        return hit

    def cpu_s(self) -> float:
        """CPU seconds of all that ever ran in it."""
        return self._count("cpu.stat", "usage_usec") / 1e6

    def kill_younger(self, than_ticks: int, but: int | None) -> None:
        """Kill what started after `than_ticks` (clock ticks since boot), except for `but`, a pid of the user's world."""
        with open(f"{self.path}/cgroup.procs") as file:
            pids = file.read().split()
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    started = int(file.read().rpartition(b")")[2].split()[19])
                if started > than_ticks and _inner_pid(pid) != but:
                    os.kill(int(pid), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended by itself

    def _count(self, file_name: str, key: str) -> int:
        with open(f"{self.path}/{file_name}") as file:
            for line in file:
                name, _, value = line.partition(" ")
                if name == key:
                    return int(value)
        return 0

    def remove(self) -> bool:
        """False while something still runs in it."""
        try:
            os.rmdir(self.path)
        except OSError:
            return False
        return True


def disk_is_full(root: str) -> bool:
    """Whether programs can write nothing more to the disk that `root` is on."""
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize < DISK_FULL_BYTES or status.f_favail == 0


def ticks(monotonic_s: float) -> int:
    """A moment in the unit in which the kernel tells when a process started. A guest never sleeps, so the clocks agree."""
    return int(monotonic_s * os.sysconf("SC_CLK_TCK"))


def _inner_pid(pid: str) -> int | None:
    """The number that a process has in its own pid namespace."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
