"""What of ours exists on this host right now, read from the host and not from our records."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from instavm.node.jail.cgroups import Cgroups
from instavm.node.jail.gate import is_held
from instavm.node.jail.jailer import JAIL_OPTION, find_root

_ROOT = Path("/")
VMMS = ("qemu-system", "firecracker")
JAILERS = ("bwrap",)
"""What starts a VMM and waits for its end; known by the same folder in its command line."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What must be gone when no sandbox is left. Two that are equal hold the same things."""

    processes: frozenset[int]
    homes: frozenset[str]
    groups: frozenset[str] = frozenset()
    """Machines that have a control group."""


def take(state_dir: Path) -> Inventory:
    folder = state_dir / "machines"
    homes = frozenset(entry.name for entry in folder.iterdir()) if folder.is_dir() else frozenset[str]()
    groups = Cgroups(state_dir).machines() if state_dir.is_dir() else frozenset[str]()
    return Inventory(frozenset(process.pid for process in vmm_processes(folder) if not _serves(process)), homes, groups)


def vmm_processes(folder: Path, kinds: tuple[str, ...] = VMMS) -> Iterator[psutil.Process]:
    """VMM processes whose disk lies under `folder`: known by what they run on, not by a number written down somewhere."""
    for process in psutil.process_iter():
        try:
            wanted = _program(process.pid).startswith(kinds) or (kinds != VMMS and _becomes_a_jail(process.cmdline()))
            if wanted and _place(process, folder) is not None:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
            continue


def _becomes_a_jail(command: list[str]) -> bool:
    """Whether a process is a step on the way to a VMM that is neither its jailer nor the VMM yet."""
    return JAIL_OPTION in command or is_held(command)


def _program(pid: int) -> str:
    """What it runs now. psutil would tell what it ran when it was first asked, and a jail's process changes that."""
    return Path(f"/proc/{pid}/exe").readlink().name


def running(folder: Path) -> dict[str, int]:
    """Machines under `folder` that run: name → pid."""
    return {
        name: process.pid
        for process in vmm_processes(folder)
        if (name := _machine(process, folder)) is not None and not _serves(process)
    }


def _serves(process: psutil.Process) -> bool:
    """Whether it is only the disk of a machine whose VMM is another process."""
    try:
        return process.cmdline()[1:3] == ["-M", "none"]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return True


def _machine(process: psutil.Process, folder: Path) -> str | None:
    """The machine that a VMM process is; None when it has ended meanwhile."""
    place = _place(process, folder)
    return None if place is None else place.partition(f"{folder}/")[2].partition("/")[0]


def _place(process: psutil.Process, folder: Path) -> str | None:
    """A path under `folder` that it runs on: one in its command line, or the folder that it sees as its root."""
    mark = f"{folder}/"
    try:
        named = next((argument for argument in process.cmdline() if mark in argument), None)
        if named is not None:
            return named
        root = Path(f"/proc/{process.pid}/root").stat()
        own = _ROOT.stat()
        if (root.st_dev, root.st_ino) == (own.st_dev, own.st_ino):
            return None
        for home in (folder, *folder.iterdir()):
            jail = find_root(home)
            if (
                jail is not None
                and (found := jail.stat())
                and (found.st_dev, found.st_ino) == (root.st_dev, root.st_ino)
            ):
                return f"{home}/"
    except (psutil.NoSuchProcess, OSError):
        return None
    return None


def clear(state_dir: Path, keep: frozenset[str] = frozenset()) -> list[int]:
    """End the machines and remove the folders that a killed server left behind, except `keep`; the pids ended.

    Only with the state directory's lock held.
    """
    folder = state_dir / "machines"
    ended: list[int] = []
    while found := [one for one in vmm_processes(folder, VMMS + JAILERS) if _machine(one, folder) not in keep]:
        # again, until there is none: a jail whose server died while it was made may become a VMM under our eyes
        ended += [process.pid for process in found if _end(process)]
    if folder.is_dir():
        for home in folder.iterdir():
            if home.name not in keep:
                shutil.rmtree(home, ignore_errors=True)
    return ended


def remove_unfinished(folder: Path) -> None:
    """A template that was being made in `folder` when its maker was killed: end the machine that was booted, remove the rest."""
    for process in vmm_processes(folder, VMMS + JAILERS):
        _end(process)
    shutil.rmtree(folder, ignore_errors=True)


def _end(process: psutil.Process) -> bool:
    """Kill it and wait for it. Returns: whether it was still there."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not process.is_running():  # the number means another process by now
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        process.wait(10)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    finally:
        os.close(pidfd)
    return True
