"""A jail for every VMM: a uid of its own, no rights, its own namespaces and root, a system call filter, limits.

`Jails` belongs to the node and makes a `Cage` for each machine. A step that fails stops the start: nothing runs half
confined. What is in force can be read back from the kernel (`node/isolation.py`), and is, by tests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from instavm.errors import BootFailed, HostNotReady
from instavm.node import precedence
from instavm.node.jail import bubblewrap, gate, seccomp
from instavm.node.jail.bubblewrap import Walls
from instavm.node.jail.cgroups import TASKS, Cgroups, Limits
from instavm.node.jail.uids import Uids
from instavm.settings import Settings

log = logging.getLogger(__name__)

UID_LOCKS = Path("/run/instavm-uids.lock")
"""One for the host, whatever folders its servers use."""
KVM_DEVICE = Path("/dev/kvm")
WALLS_S = 10.0
"""How long bubblewrap may take to make a jail; it needs milliseconds."""
DESCRIPTORS = 256
OVERHEAD = 1 << 24
"""Bytes that a disk's own tables may take beyond one in a thousand of its size."""
HOW_TO_GET = "apt-get install bubblewrap util-linux"


@dataclass(frozen=True, slots=True)
class Needs:
    """What one VMM must have. Whatever is not named here it does not get."""

    home: Path
    """Its machine's folder, whose name is the machine's."""
    vcpus: int
    memory_mib: int
    writable: tuple[Path, ...] = ()
    """Files in `home` that it may write; it can make, rename and remove none."""
    descriptors: tuple[int, ...] = ()
    kvm: bool = False
    placed: tuple[tuple[Path, str], ...] = ()
    """Files that it sees, to read, at another place than the host has them."""
    calls: tuple[str, ...] = ()
    """System calls that it may make beside those that every VMM may."""


class Cage:
    """One machine's confinement, from before its VMM runs until nothing of it is left."""

    def __init__(self, machine: str, uid: int | None, uids: Uids | None, cgroups: Cgroups | None, vcpus: int) -> None:
        self.machine = machine
        self.uid = uid
        self._uids = uids
        self._cgroups = cgroups
        self._vcpus = vcpus
        self.over_memory = False
        """Whether the host ended it for using more memory than it may; known once it was removed."""

    def own(self, file: Path) -> None:
        """Let what runs in it have a file of its folder. Raises OSError."""
        if self.uid is not None:
            os.chown(file, self.uid, self.uid)

    def idle(self, idle: bool) -> None:
        if self._cgroups is not None:
            self._cgroups.idle(self.machine, idle, self._vcpus)

    def remove(self) -> None:
        """Once the VMM is gone; what else runs in it is ended. Twice is fine."""
        try:
            if self._cgroups is not None:
                self._cgroups.end(self.machine)
                self.over_memory = self.over_memory or self._cgroups.over_memory(self.machine)
                self._cgroups.remove(self.machine)
        finally:
            if self._uids is not None and self.uid is not None:
                self._uids.give_back(self.uid)


@dataclass(frozen=True, slots=True)
class Jailed:
    """A process that was just started. `pid` is its own; `parent` is ours to reap, and ends with it."""

    pid: int
    parent: subprocess.Popen[bytes]
    cage: Cage


class Jails:
    """What the jails of one server have in common."""

    def __init__(self, settings: Settings, uids: Uids | None, cgroups: Cgroups | None) -> None:
        self.on = settings.jail == "on"
        self.cgroups = cgroups
        self._settings = settings
        self._uids = uids

    @classmethod
    @contextmanager
    def open(cls, settings: Settings) -> Iterator[Jails]:
        """Raises HostNotReady: this host can't make jails, and was not told to do without."""
        if settings.jail == "off":
            log.warning("INSTAVM_JAIL=off: a VMM that is broken into has all the rights of this server")
            yield cls(settings, None, None)
            return
        check(settings)
        with contextlib.ExitStack() as undo:
            uids = None
            cgroups: Cgroups | None = Cgroups(settings.state_dir)
            assert cgroups is not None
            if os.geteuid() == 0:
                uids = Uids(settings.jail_uid_first, settings.jail_uid_count, UID_LOCKS)
                undo.callback(uids.close)
                cgroups.open()
                undo.callback(cgroups.close)
            else:
                log.warning("not root: VMMs get no uid of their own and no limits beyond their vCPUs and memory")
                cgroups = None
            yield cls(settings, uids, cgroups)

    async def start(self, argv: Sequence[str], needs: Needs, output: int) -> Jailed:
        """Run a program in a jail of its own. `output`: its stdout and stderr.

        Raises: HostNotReady (a step of the jail failed), BootFailed; whatever was done is undone then.
        """
        if not self.on:
            popen = spawn(argv, needs.descriptors, output)
            precedence.like_everybody(popen.pid)
            return Jailed(popen.pid, popen, Cage(needs.home.name, None, None, None, needs.vcpus))
        cage = await self.make(needs)
        try:
            return await self.enter(cage, argv, needs, output)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(cage.remove)
            raise

    async def make(self, needs: Needs) -> Cage:
        """A cage with nothing in it yet; whoever asked removes it. Raises HostNotReady."""
        return await anyio.to_thread.run_sync(self._make, needs)

    def adopt(self, pid: int, home: Path) -> Cage:
        """The cage of a VMM that an earlier server started."""
        uid = Path(f"/proc/{pid}").stat().st_uid
        leased = self._uids is not None and self._uids.adopt(uid)
        vcpus = 1 if self.cgroups is None else self.cgroups.vcpus(home.name)
        return Cage(home.name, uid if leased else None, self._uids, self.cgroups, vcpus)

    def clear(self, keep: frozenset[str]) -> None:
        """Remove the groups that a killed server left, with what still runs in them, except those of the machines in `keep`."""
        if self.cgroups is not None:
            for machine in self.cgroups.machines() - keep:
                self.cgroups.end(machine)
                self.cgroups.remove(machine)

    def _make(self, needs: Needs) -> Cage:
        uid = None if self._uids is None else self._uids.lease()
        cage = Cage(needs.home.name, uid, self._uids, self.cgroups, needs.vcpus)
        try:
            if self.cgroups is not None:
                self.cgroups.make(cage.machine, self._limits(needs))
            if uid is not None:
                os.chown(needs.home, 0, uid)
                needs.home.chmod(0o710)
                for file in needs.writable:
                    os.chown(file, uid, uid)
        except OSError as exc:
            cage.remove()
            raise HostNotReady(f"{exc.filename}: a jail can't be made: {exc.strerror}") from exc
        return cage

    async def enter(self, cage: Cage, argv: Sequence[str], needs: Needs, output: int) -> Jailed:
        """Run a program in a cage. Raises HostNotReady, BootFailed; it has ended then."""
        walls = Walls(argv[0], needs.home, cage.uid, *_kvm(needs), placed=needs.placed)
        with gate.pipe() as go, gate.pipe(never_breaks=True) as says:
            with readable(seccomp.program(needs.calls)) as filter_fd:
                command = [*bubblewrap.arguments(walls, says=says.writes, seccomp=filter_fd), *argv]
                given = (*needs.descriptors, says.writes, filter_fd)
                popen = spawn(gate.held(command), given, output, stdin=go.reads)
            go.close_reads()
            says.close_writes()

            async def begin() -> int:
                await self.confine(cage, popen.pid)
                os.write(go.writes, gate.GO)
                return await bubblewrap.told_pid(says.reads)

            return await self.begun(popen, cage, begin)

    async def begun(self, popen: subprocess.Popen[bytes], cage: Cage, begin: Callable[[], Awaitable[int]]) -> Jailed:
        """Have a program that waits begin in its cage. Whatever fails ends it, and all that it started.

        begin: confines it, lets it go, and returns its number on this host. Raises HostNotReady, BootFailed.
        """
        try:
            with anyio.fail_after(WALLS_S):
                return Jailed(await begin(), popen, cage)
        except BaseException as exc:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(end, popen)
            if isinstance(exc, TimeoutError):
                raise HostNotReady(f"no jail was made within {WALLS_S:.0f} s") from exc
            raise

    async def confine(self, cage: Cage, pid: int) -> None:
        """Put a process that has not begun yet, and all that it starts, within its limits. Raises HostNotReady, BootFailed."""
        await anyio.to_thread.run_sync(self._confine, cage, pid)

    def _confine(self, cage: Cage, pid: int) -> None:
        precedence.like_everybody(pid)
        try:
            if self.cgroups is not None:
                self.cgroups.put(cage.machine, pid)
            for limit, value in self.rlimits(cage.uid is not None).items():
                resource.prlimit(pid, limit, (value, value))
        except ProcessLookupError as exc:
            raise BootFailed(f"the VMM of {cage.machine} ended before it began") from exc
        except OSError as exc:
            raise HostNotReady(f"the VMM of {cage.machine} can't be confined: {exc}") from exc

    def rlimits(self, own_uid: bool) -> dict[int, int]:
        """Resource → its limit, hard and soft."""
        size = max(self._settings.disk_gib << 30, 1 << 34)
        return {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NOFILE: DESCRIPTORS,
            resource.RLIMIT_FSIZE: size + size // 1000 + OVERHEAD,
            resource.RLIMIT_MSGQUEUE: 0,
            **({resource.RLIMIT_NPROC: TASKS} if own_uid else {}),
        }

    def _limits(self, needs: Needs) -> Limits:
        return Limits(
            needs.vcpus, needs.memory_mib, self._settings.io_mib_per_s << 20, self._settings.io_operations_per_s
        )


def require(whom: str) -> None:
    """What every jail is made with. Raises HostNotReady, when `whom` can't be jailed on this host."""
    for program in (bubblewrap.BINARY, bubblewrap.SETPRIV):
        if shutil.which(program) is None:
            raise HostNotReady(f"{program} is missing, so {whom} can't be jailed. Install it with: {HOW_TO_GET}")


def check(settings: Settings) -> str:
    """Make a jail and run a program in it; what was found, in words. Raises HostNotReady with the remedy."""
    require("VMMs")
    uid = settings.jail_uid_first if os.geteuid() == 0 else None
    walls = Walls(bubblewrap.SETPRIV, None, uid)
    try:
        with readable(seccomp.program()) as filter_fd, gate.pipe(never_breaks=True) as says:
            command = bubblewrap.arguments(walls, says=says.writes, seccomp=filter_fd)
            tried = subprocess.run(
                [*command, bubblewrap.SETPRIV, "--version"],
                pass_fds=(says.writes, filter_fd),
                capture_output=True,
                text=True,
                timeout=WALLS_S,
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as exc:
        raise HostNotReady(f"{bubblewrap.BINARY} can't be started: {exc}") from exc
    if tried.returncode:
        raise HostNotReady(
            f"{bubblewrap.BINARY} can't make a jail here: {tried.stderr.strip()[:300]}. VMMs need namespaces of their own"
            " (as root, or with unprivileged user namespaces); INSTAVM_JAIL=off does without, at the price of all they give"
        )
    return (
        "as root: VMMs and the API each have a uid of their own, no rights, own namespaces"
        if uid is not None
        else "without root: VMMs have namespaces of their own and your uid; the API's process is not confined"
    )


def _kvm(needs: Needs) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The device and the group that may open it, where it is used. Raises HostNotReady: only root may."""
    if not needs.kvm:
        return (), ()
    try:
        about = KVM_DEVICE.stat()
    except OSError as exc:
        raise HostNotReady(f"{KVM_DEVICE}: {exc.strerror}") from exc
    if about.st_mode & 0o006 == 0o006:
        return (str(KVM_DEVICE),), ()
    if about.st_mode & 0o060 == 0o060 and about.st_gid != 0:
        return (str(KVM_DEVICE),), (about.st_gid,)
    raise HostNotReady(
        f"{KVM_DEVICE} can be opened by root alone, and VMMs don't run as root: give it to a group"
        " (chgrp kvm, chmod 660), or set INSTAVM_ACCELERATION=tcg"
    )


def spawn(
    argv: Sequence[str], descriptors: Sequence[int], output: int, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """In a session of its own, with SIGXFSZ ignored as it is here: a file at its limit is an error to report, not the end."""
    return subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=output,
        stderr=output,
        pass_fds=descriptors,
        start_new_session=True,
        restore_signals=False,
        cwd="/",
        env={"LANG": "C.UTF-8", "PATH": os.defpath},
    )


def end(popen: subprocess.Popen[bytes], pid: int | None = None) -> None:
    """End what `spawn` started with all that it started, of which `pid` may have left its group. Twice is fine."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if popen.returncode is None:  # nobody has reaped it, so the number is still its group's
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


@contextmanager
def readable(data: bytes) -> Iterator[int]:
    """A descriptor from which `data` (less than a pipe holds) can be read, once."""
    out, into = os.pipe()
    try:
        os.write(into, data)
        os.close(into)
        yield out
    finally:
        os.close(out)
