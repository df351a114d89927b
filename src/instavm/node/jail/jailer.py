"""Firecracker's own jailer, around the VMM that it was made for.

It changes the root, makes the devices and gives up root. What it does not do is done around it: namespaces that it has no
option for, the mounts that it carries over into the new root, and the wait until limits are in force.
"""

from __future__ import annotations

import os
import resource
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

import anyio

from instavm.errors import HostNotReady
from instavm.node import planted
from instavm.node.jail.jail import Cage, Jailed, Jails, spawn

ID = "m"
"""The jailer's name of a machine, short since paths of sockets are; the machine's own is that of its folder."""
JAIL_OPTION = "--chroot-base-dir"
"""In the command lines of all that becomes a Firecracker; the folder of its machine follows."""
RIGHTS = ("chown", "dac_override", "fowner", "setgid", "setuid", "sys_admin", "sys_chroot", "sys_resource", "mknod")
"""What the jailer needs. It drops all of them with its uid, and without new privileges nothing can be had again."""
_UCRED = struct.Struct("3i")
_WAIT = """\
"$@" <&0 &
exec </dev/null
for fd in $IVM_FDS; do eval "exec $fd>&-"; done
wait $!
status=$?
while read -r name uid rest; do
    if [ "$name $uid" = "Uid: $IVM_UID" ]; then kill -9 $IVM_DISK; fi
done </proc/$IVM_DISK/status
exit $status
"""
"""Starts what follows as the first process of a process namespace, and ends as it ends, with the server of its disk, whatever
became of ours. It must not hold the disk's descriptor: a file system whose server is gone is given up by the kernel only
when nobody holds that. When that first process is gone this shell can start no other: no command of its last lines is one."""
_BEGIN = """\
set -e
mount -t proc proc /proc
echo here >&0
read -r go
exec </dev/null
mount -i -t fuse -o "$1" disk "$2/disk"
root=$2; shift 2
while [ "$1" != -- ]; do mount --bind -o ro "$1" "$root/$2"; shift 2; done
shift
hostname vmm
exec "$@"
"""
"""Runs as root in the machine's own namespaces, in which its mounts are gone when it is gone."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What one Firecracker gets. Everything else it does not have."""

    firecracker: Path
    jailer: Path
    home: Path
    """The machine's folder."""
    fuse: int
    """An opened /dev/fuse: whoever serves the other side of it is the disk, `/disk`."""
    disk: int
    """The process that does, which ends with this one."""
    shown: tuple[tuple[Path, str], ...]
    """Files of the host, to be read only, and what they are called inside."""
    network: int | None
    """Its network namespace; None = an empty one of its own."""

    @property
    def root(self) -> Path:
        return root_of(self.home, self.firecracker)

    @property
    def given(self) -> tuple[int, ...]:
        """The descriptors that its making takes; the VMM inherits none."""
        return (self.fuse, *(() if self.network is None else (self.network,)))


def root_of(home: Path, firecracker: Path) -> Path:
    """What the VMM sees as `/`."""
    return home / firecracker.name / ID / "root"


def find_root(home: Path) -> Path | None:
    """The same of a machine that is there already."""
    return next(home.glob(f"firecracker*/{ID}/root"), None)


def arguments(cell: Cell, uid: int, limits: dict[int, int]) -> list[str]:
    """Everything around the VMM, down to its own arguments."""
    names = {resource.RLIMIT_FSIZE: "fsize", resource.RLIMIT_NOFILE: "no-file"}
    fuse = (
        f"fd={cell.fuse},rootmode=100000,user_id={uid},group_id={uid},default_permissions,allow_other,max_read=1048576"
    )
    given = " ".join(map(str, cell.given))
    rights = ",".join(("-all", *(f"+{name}" for name in RIGHTS)))
    return [
        *(("unshare", "--net") if cell.network is None else ("nsenter", f"--net=/proc/self/fd/{cell.network}")),
        *("--", "unshare", "--mount", "--pid", "--ipc", "--uts", "--cgroup", "--"),
        *("env", f"IVM_FDS={given}", f"IVM_DISK={cell.disk}", f"IVM_UID={uid}"),
        *("bash", "--norc", "--noprofile", "-c", _WAIT, "bash", "env", "--ignore-environment", f"PATH={os.defpath}"),
        *("setpriv", "--no-new-privs", f"--bounding-set={rights}", "--"),
        *("sh", "-c", _BEGIN, "sh", fuse, str(cell.root)),
        *(part for file, place in cell.shown for part in (str(file), place)),
        *("--", str(cell.jailer), "--id", ID, "--exec-file", str(cell.firecracker)),
        *("--uid", str(uid), "--gid", str(uid), JAIL_OPTION, str(cell.home)),
        *(part for limit, name in names.items() for part in ("--resource-limit", f"{name}={limits[limit]}")),
        *("--", "--api-sock", "/api.sock", "--level", "Warn"),
    ]


async def start(jails: Jails, cage: Cage, cell: Cell, output: int) -> Jailed:
    """Raises HostNotReady (a step of the jail failed), BootFailed; it has ended then."""
    if cage.uid is None:
        raise HostNotReady("Firecracker runs in its jailer only, which needs root and INSTAVM_JAIL=on")
    await anyio.to_thread.run_sync(_furnish, cell, cage.uid)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.setblocking(False)
        command = arguments(cell, cage.uid, jails.rlimits(True))
        popen = spawn(command, cell.given, output, theirs.fileno())
        theirs.close()

        async def begin() -> int:
            pid = await _told_pid(ours)
            await jails.confine(cage, pid)
            ours.send(b"go\n")
            return pid

        return await jails.begun(popen, cage, begin)


def _furnish(cell: Cell, uid: int) -> None:
    """Where its files will be put. Raises HostNotReady."""
    try:
        root = planted.make_folders(cell.home, *cell.root.relative_to(cell.home).parts)
        for place in ("disk", *(place for _, place in cell.shown)):
            planted.make_empty(root / place)
        os.mkfifo(cell.root / "metrics", 0o600)
        os.chown(cell.root / "metrics", uid, uid)
    except OSError as exc:
        raise HostNotReady(f"{exc.filename}: a jail can't be made: {exc.strerror}") from exc


async def _told_pid(line: socket.socket) -> int:
    """Who wrote to the line, as a number of this host: the kernel says so, whatever namespace they are in."""
    await anyio.wait_readable(line)
    data, told, _, _ = line.recvmsg(64, socket.CMSG_SPACE(_UCRED.size))
    for level, kind, about in told:
        if data and level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return int(_UCRED.unpack(about[: _UCRED.size])[0])
    raise HostNotReady("the namespaces of a jail could not be made")
