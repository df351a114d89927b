"""The jail's walls, by bubblewrap: what a program is started with, and how its number on the host is learnt.

A pure list of arguments, and one function that waits for bubblewrap to say that the walls stand. The program is held in
front of its first instruction until it is let go, so that limits are in force before there is anything to limit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    home: Path
    """Its folder. That it is bound writable does not mean that the program may write there: its files' owners say that."""
    uid: int | None
    """None: no uid of its own (the server is not root), but a user namespace in which it is nobody."""
    devices: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    """Supplementary groups, for devices that only a group may open."""
    placed: tuple[tuple[Path, str], ...] = ()
    """Files that it sees, to read, at another place than the host has them."""


def arguments(walls: Walls, *, says: int, go: int, seccomp: int) -> list[str]:
    """bubblewrap's and setpriv's part of a command line; the program and its own arguments follow.

    says, go, seccomp: descriptors: where the number of the process is told, what it waits for, its filter.
    """
    seen = [*PROGRAM_FILES, walls.program, *([] if walls.uid is None else [SETPRIV])]
    binds = [argument for path in seen for argument in ("--ro-bind", path, path)]
    binds += [argument for file, place in walls.placed for argument in ("--ro-bind", str(file), place)]
    devices = [argument for path in ("/dev/null", *walls.devices) for argument in ("--dev-bind", path, path)]
    return [
        *(BINARY, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
        *(("--unshare-user",) if walls.uid is None else ()),
        *("--as-pid-1", "--hostname", "vmm", "--clearenv", "--setenv", "LANG", "C.UTF-8"),
        *("--cap-drop", "ALL", *(() if walls.uid is None else _caps("SETUID", "SETGID", "SETPCAP"))),
        *(
            argument
            for folder in _folders(
                ["/dev/null", *seen, *walls.devices, *(place for _, place in walls.placed), str(walls.home)]
            )
            for argument in ("--dir", folder)
        ),
        *binds,
        *devices,
        *(argument for place, target in LINKS.items() for argument in ("--symlink", target, place)),
        *("--bind", str(walls.home), str(walls.home)),
        *("--proc", "/proc", "--remount-ro", "/", "--chdir", "/"),
        *("--info-fd", str(says), "--block-fd", str(go), "--seccomp", str(seccomp), "--"),
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


def _folders(paths: Sequence[str]) -> list[str]:
    """Every folder above `paths`, outermost first; made by hand because those that bubblewrap makes are its own alone."""
    above = {str(folder) for path in paths for folder in Path(path).parents if folder != Path("/")}
    return sorted(above - {*PROGRAM_FILES})


async def told_pid(says: int) -> int | None:
    """The number of the jailed process on this host; None when bubblewrap ended without one."""
    said = b""
    while b"}" not in said and len(said) < SAYS_BYTES:
        await anyio.wait_readable(says)
        more = os.read(says, SAYS_BYTES)
        if not more:
            return None
        said += more
    try:
        return int(json.loads(said)["child-pid"])
    except (ValueError, KeyError, TypeError) as exc:
        raise HostNotReady(f"{BINARY} said what can't be read: {said[:200]!r}") from exc
