"""The jail's walls, by bubblewrap: what a program is started with, and how its number on the host is learnt.

A pure list of arguments, and one function that waits for bubblewrap to say that the walls stand. Limits are in force before
bubblewrap itself begins (`gate.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from instavm.errors import HostNotReady

BINARY = "bwrap"
SETPRIV = "/usr/bin/setpriv"
PROGRAM_FILES = (
    "/etc/ld.so.cache",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/share/qemu",
    "/usr/share/seabios",
)
"""What QEMU needs to run at all: its libraries and firmware. No shell, no interpreter, no other program."""
LINKS = {"/lib": "usr/lib", "/lib64": "usr/lib64"}
NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "cgroup")
SAYS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Walls:
    """What one program gets to see. All paths are the host's, and the same inside."""

    program: str
    home: Path | None
    """Its folder. That it is bound writable does not mean that the program may write there: its files' owners say that."""
    uid: int | None
    """None: no uid of its own (the server is not root), but a user namespace in which it is nobody."""
    devices: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    """Supplementary groups, for devices that only a group may open."""
    files: tuple[str, ...] | None = None
    """What else of the host it may read; None: what QEMU needs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    hostname: str = "vmm"
    placed: tuple[tuple[Path, str], ...] = ()
    """Files that it sees, to read, at another place than the host has them."""


def arguments(walls: Walls, *, says: int, seccomp: int) -> list[str]:
    """bubblewrap's and setpriv's part of a command line; the program and its own arguments follow.

    says, seccomp: descriptors: where the number of the process is told, in a pipe that never breaks, and its filter.
    """
    files = PROGRAM_FILES if walls.files is None else walls.files
    seen = [*files, walls.program, *([] if walls.uid is None else [SETPRIV])]
    home = [] if walls.home is None else [str(walls.home)]
    binds = [argument for path in seen for argument in ("--ro-bind", path, path)]
    binds += [argument for file, place in walls.placed for argument in ("--ro-bind", str(file), place)]
    devices = [argument for path in ("/dev/null", *walls.devices) for argument in ("--dev-bind", path, path)]
    return [
        *(BINARY, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *(("--unshare-user",) if walls.uid is None else ()),
        *("--as-pid-1", "--hostname", walls.hostname, "--clearenv", "--setenv", "LANG", "C.UTF-8"),
        *(word for name, value in walls.environment.items() for word in ("--setenv", name, value)),
        *("--cap-drop", "ALL", *(() if walls.uid is None else _caps("SETUID", "SETGID", "SETPCAP"))),
        *(
            argument
            for folder in _folders(
                ["/dev/null", *seen, *walls.devices, *home, *(place for _, place in walls.placed)], files
            )
            for argument in ("--dir", folder)
        ),
        *binds,
        *devices,
        *(argument for place, target in LINKS.items() for argument in ("--symlink", target, place)),
        *(("--bind", *home, *home) if home else ()),
        *("--proc", "/proc", "--remount-ro", "/", "--chdir", "/"),
        *("--info-fd", str(says), "--seccomp", str(seccomp), "--"),
        *_without_rights(walls),
    ]


def _without_rights(walls: Walls) -> list[str]:
    if walls.uid is None:
        return []
    groups = f"--groups={','.join(map(str, walls.groups))}" if walls.groups else "--clear-groups"
    return [
        *(SETPRIV, f"--reuid={walls.uid}", f"--regid={walls.uid}", groups),
        *("--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs", "--"),
    ]


def _caps(*names: str) -> Iterator[str]:
    for name in names:
        yield from ("--cap-add", f"CAP_{name}")


def _folders(paths: Sequence[str], bound: Sequence[str]) -> list[str]:
    """Every folder above `paths`, outermost first; made by hand because those that bubblewrap makes are its own alone."""
    above = {str(folder) for path in paths for folder in Path(path).parents if folder != Path("/")}
    return sorted(folder for folder in above if not any(Path(folder).is_relative_to(one) for one in bound))


async def told_pid(says: int) -> int:
    """The number of the jailed process on this host. Raises HostNotReady: bubblewrap ended without one."""
    said = b""
    while b"}" not in said and len(said) < SAYS_BYTES:
        await anyio.wait_readable(says)
        more = os.read(says, SAYS_BYTES)
        if not more:
            raise HostNotReady(f"{BINARY} could not make a jail")
        said += more
    return pid_in(said)


def pid_in(said: bytes) -> int:
    """Raises HostNotReady."""
    try:
        return int(json.loads(said)["child-pid"])
    except (ValueError, KeyError, TypeError) as exc:
        raise HostNotReady(f"{BINARY} said what can't be read: {said[:200]!r}") from exc
