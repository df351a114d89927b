"""The line to a QEMU's monitor (QMP), whatever that QEMU is: a machine, or only the server of a disk."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import anyio
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from instavm.errors import BootFailed, HostNotReady

TIMEOUT_S = 30.0


class Monitor:
    def __init__(self, last_words: Callable[[], str]) -> None:
        """last_words: what the process printed, for messages."""
        self._qmp = QMPClient()
        self._last_words = last_words

    async def connect(self, place: Path) -> None:
        """Raises BootFailed."""
        try:
            with deadline("QEMU did not start"):
                await self._qmp.connect(str(place))
        except (QMPError, OSError, EOFError) as exc:
            raise BootFailed(f"QEMU did not start: {self._last_words() or exc}") from exc

    async def execute(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Raises BootFailed."""
        try:
            with deadline(f"QEMU did not answer {command}"):
                return await self._qmp.execute(command, arguments)
        except (QMPError, OSError, EOFError) as exc:
            raise BootFailed(f"QEMU: {command}: {exc} {self._last_words()}".strip()) from exc

    def send_fd(self, fd: int) -> None:
        """A descriptor that goes with the next command."""
        self._qmp.send_fd_scm(fd)

    async def migrate(self, command: str, uri: str) -> None:
        """Raises BootFailed."""
        with self._qmp.listener("MIGRATION") as events:
            await self.execute(command, {"uri": uri})
            with deadline(f"{command} did not end"):
                async for event in events:
                    status = cast(dict[str, Any], event["data"])["status"]
                    if status == "completed":
                        return
                    if status in ("failed", "cancelled"):
                        raise BootFailed(f"{command} {status}: {self._last_words()}")

    async def new_layer(self, layer: Path) -> None:
        """Have the drive `root` write to `layer`, an empty overlay on what it writes to now. Raises BootFailed."""
        how: dict[str, object] = {"device": "root", "snapshot-file": str(layer), "format": "qcow2", "mode": "existing"}
        await self.execute("blockdev-snapshot-sync", how)

    async def merge_layers(self, base_node: str, base: Path) -> None:
        """Copy into the uppermost layer of the drive `root` what lies between it and `base`. Raises BootFailed."""
        how: dict[str, object] = {
            "job-id": "merge",
            "device": "root",
            "base-node": base_node,
            "backing-file": str(base),
        }
        with self._qmp.listener(("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")) as events:
            await self.execute("block-stream", how)
            async for event in events:
                told = cast(dict[str, Any], event["data"])
                if told["device"] == "merge":
                    if event["event"] == "BLOCK_JOB_CANCELLED" or "error" in told:
                        raise BootFailed(f"layers could not be merged: {told.get('error', 'cancelled')}")
                    return

    async def hang_up(self) -> None:
        """Twice is fine."""
        with suppress(QMPError, OSError, EOFError):  # that the line of one that was killed is broken is no news
            await self._qmp.disconnect()


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket for a QEMU to inherit, so that we can dial before it has even started. Raises HostNotReady.

    It never blocks: while QEMU gives its monitor a thread of its own, two of its threads may accept the same call, and the one
    that comes too late would wait for another call with everything else of that QEMU behind it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(path))
        except OSError as exc:
            raise HostNotReady(f"can't make the socket {path}: {exc}; is INSTAVM_STATE_DIR too long or full?") from exc
        path.chmod(0o600)
        listener.setblocking(False)
        listener.listen(1)
        yield listener


@contextmanager
def deadline(what: str) -> Iterator[None]:
    try:
        with anyio.fail_after(TIMEOUT_S):
            yield
    except TimeoutError as exc:
        raise BootFailed(f"{what} within {TIMEOUT_S:.0f} s") from exc
