"""What the agent sets up around the user's world: control groups, and who this sandbox is."""

from __future__ import annotations

import os
import socket
import time

from instavm_guest import kernel
from instavm_guest.frames import Message
from instavm_guest.spawner import IDENTITY_DIR, IDENTITY_FILES

CGROUPS = "/sys/fs/cgroup"
USER = f"{CGROUPS}/user"
AGENT_RESERVE = 24 << 20
"""Bytes of memory that the user's processes can't have, so that the agent can always answer."""
PIDS_MAX = 4096
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
    os.makedirs(USER, exist_ok=True)
    _write(f"{USER}/cgroup.subtree_control", "+memory +pids")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _write(f"{USER}/memory.max", str(total - AGENT_RESERVE))
    _write(f"{USER}/pids.max", str(PIDS_MAX))


class Identity:
    """Who this sandbox is: clock, entropy, names.

    Everything it needs is open before the template is saved: right after a restore each new path through kernel and
    interpreter costs time, since an emulator has to translate it first.
    """

    def __init__(self) -> None:
        os.makedirs(IDENTITY_DIR, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._files = {name: os.open(f"{IDENTITY_DIR}/{name}", flags, 0o644) for name in IDENTITY_FILES}
        self._random = os.open("/dev/random", os.O_RDWR | os.O_CLOEXEC)
        self._lengths = dict.fromkeys(IDENTITY_FILES, 0)

    def take(self, message: Message) -> None:
        """Become someone of one's own. Raises OSError, KeyError or ValueError; then nobody may run.

        message: `time` in seconds since the epoch, `entropy` hex of at least 32 bytes, `hostname`, `machine_id`, `boot_id`.
        """
        entropy = bytes.fromhex(message["entropy"])
        if len(entropy) < 32:
            raise ValueError("at least 32 bytes of entropy are needed")
        time.clock_settime(time.CLOCK_REALTIME, message["time"])
        kernel.reseed(self._random, entropy)
        hostname = message["hostname"]
        socket.sethostname(hostname)
        self._write("hostname", hostname + "\n")
        self._write("hosts", HOSTS + hostname + "\n")
        self._write("machine-id", message["machine_id"] + "\n")
        self._write("boot_id", message["boot_id"] + "\n")

    def _write(self, name: str, text: str) -> None:
        data = text.encode()
        os.pwrite(self._files[name], data, 0)
        if len(data) != self._lengths[name]:
            os.ftruncate(self._files[name], len(data))
            self._lengths[name] = len(data)


class Cgroup:
    """A control group for one program and everything it starts."""

    def __init__(self, name: str) -> None:
        self.path = f"{USER}/{name}"
        os.makedirs(self.path, exist_ok=True)

    def open_procs(self) -> int:
        return os.open(f"{self.path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    def kill(self) -> None:
        _write(f"{self.path}/cgroup.kill", "1")

    def remove(self) -> bool:
        """False while something still runs in it."""
        try:
            os.rmdir(self.path)
        except OSError:
            return False
        return True


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
