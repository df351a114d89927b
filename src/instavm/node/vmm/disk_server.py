"""A sandbox's disk as a plain file, for a VMM that knows no other kind.

A QEMU without a machine opens the overlay with its layers, as one with a machine would, and answers for a file that the kernel
shows in the VMM's own file system (FUSE). So disks, layers, snapshots and images are the same whatever runs on them. The file
is mounted in the VMM's namespace alone; this side has only the descriptor that the kernel's questions come from.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import anyio

from instavm.errors import HostNotReady
from instavm.node.jail.jail import Cage, Jailed, Jails, Needs, end
from instavm.node.vmm import blocks, qemu
from instavm.node.vmm.monitor import Monitor, listening

FUSE = Path("/dev/fuse")
SOCKET = "disk.sock"
CALLS = ("splice", "tee", "vmsplice")
"""libfuse moves what is read through pipes."""


def arguments(disk: Path, layers: Sequence[Path], given: Sequence[int], monitor: int) -> list[str]:
    return [
        *("-M", "none", "-nodefaults", "-no-user-config", "-display", "none", qemu.STOPPED),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *("-chardev", f"socket,id=qmp,fd={monitor},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        *blocks.added(given),
        *blocks.root_drive(disk, layers, 1),
    ]


class DiskServer:
    def __init__(self, jailed: Jailed | None, monitor: Monitor, name: str = "") -> None:
        """name: of the mount, as libfuse is told it."""
        self._jailed = jailed
        self._monitor = monitor
        self._name = name

    @classmethod
    async def start(
        cls, jails: Jails, cage: Cage, needs: Needs, disk: Path, layers: Sequence[Path], fuse: int, output: int
    ) -> DiskServer:
        """Has opened the disk when this returns, and answers after `serve`. It ends with its cage.

        needs: the machine's; what the server must have of its own is added. Raises HostNotReady, BootFailed.
        """
        with ExitStack() as opened:
            given = [qemu.reading(layer, opened) for layer in layers]
            monitor = opened.enter_context(listening(needs.home / SOCKET)).fileno()
            # libfuse takes a mount that is there already under this name, and QEMU wants a plain file to be there
            name = f"/dev/fd/{fuse}"
            own = replace(
                needs,
                descriptors=(*given, monitor, fuse),
                kvm=False,
                placed=((disk, name),),
                calls=CALLS,
            )
            command = [qemu.binary(), *arguments(disk, layers, given, monitor)]
            jailed = await jails.enter(cage, command, own, output)
        made = cls(jailed, Monitor(lambda: ""), name)
        try:
            await made._monitor.connect(needs.home / SOCKET)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await made.aclose()
            raise
        return made

    @classmethod
    async def adopt(cls, home: Path) -> DiskServer:
        """Raises BootFailed."""
        made = cls(None, Monitor(lambda: ""))
        await made._monitor.connect(home / SOCKET)
        return made

    @property
    def pid(self) -> int:
        """Of one that was started here."""
        assert self._jailed is not None
        return self._jailed.pid

    async def serve(self) -> None:
        """Answer, once the file is mounted. Raises BootFailed."""
        nodes = await self._monitor.execute("query-block")
        node = next(one["inserted"]["node-name"] for one in nodes if one["device"] == "root")
        export: dict[str, object] = {"type": "fuse", "id": "root", "node-name": node, "mountpoint": self._name}
        await self._monitor.execute("block-export-add", {**export, "writable": True, "allow-other": "off"})

    async def new_layer(self, layer: Path) -> None:
        await self._monitor.new_layer(layer)

    async def aclose(self) -> None:
        """End it. Twice is fine."""
        await self._monitor.hang_up()
        if self._jailed is not None:
            await anyio.to_thread.run_sync(end, self._jailed.parent, self._jailed.pid)
            self._jailed = None

    async def detach(self) -> None:
        await self._monitor.hang_up()
        if self._jailed is not None and self._jailed.parent.returncode is None:
            self._jailed.parent.returncode = 0  # it is somebody else's to reap from here on


def open_fuse(opened: ExitStack) -> int:
    """One end of a file system that is not mounted yet. Raises HostNotReady."""
    try:
        return qemu.held(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC), opened)
    except OSError as exc:
        raise HostNotReady(f"{FUSE}: {exc.strerror}; Firecracker's disks need it: modprobe fuse") from exc
