"""The node's process: starts the one that control lives in, serves it a node, and ends with it.

It is the process that people start and signal. Control is told over the border, since it knows what shall become of the
sandboxes; when control dies on its own they stay, for the next server to adopt.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Final

import anyio

from instavm.border.confined import Confinement, spawned
from instavm.border.service import serve
from instavm.contract.node import Node
from instavm.errors import HostNotReady, InstaVMError
from instavm.node import precedence

log = logging.getLogger(__name__)

END_S: Final = 60.0
"""How long control may take to end once it has let go of the node."""

_HINT: Final = f"see the log; as root it runs under a uid of its own, which must be able to read {sys.prefix}"


@dataclass(frozen=True, slots=True)
class Control:
    """How control is started. `command` is given the descriptors' numbers: --link-fd, --ready-fd and those of `passes`."""

    command: Sequence[str]
    passes: dict[str, int]
    refusal: Callable[[bytes], InstaVMError]
    """What control says on --ready-fd when it cannot start; b"ready\\n" when it can."""
    confinement: Confinement | None = None


class ControlProcess:
    def __init__(self, control: Control) -> None:
        self._refusal = control.refusal
        self.link, theirs = socket.socketpair()
        self._words, ready = os.pipe()
        passes = {"link": theirs.fileno(), "ready": ready, **control.passes}
        options = [option for name, fd in passes.items() for option in (f"--{name}-fd", str(fd))]
        try:
            command, around = [*control.command, *options], control.confinement
            if around is None:
                self._process = spawned(command, tuple(passes.values()))
                pid = self._process.pid
            else:
                self._process, pid = around.start(command, tuple(passes.values()))
            self._pidfd = os.pidfd_open(pid)
            precedence.first(pid)
        except BaseException:
            self.link.close()
            os.close(self._words)
            raise
        finally:
            theirs.close()
            os.close(ready)

    async def ready(self) -> None:
        """Wait until it answers calls. Raises what kept it from it."""
        said = b""
        while not said.endswith(b"\n"):
            await anyio.wait_readable(self._words)
            piece = os.read(self._words, 1 << 16)
            if not piece:
                raise (
                    self._refusal(said)
                    if said
                    else HostNotReady(f"the API's process ended before it was ready: {_HINT}")
                )
            said += piece
        if said != b"ready\n":
            raise self._refusal(said)

    async def end(self) -> int:
        """Its exit status. It is killed when it takes too long."""
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(END_S) as patience:
                await anyio.wait_readable(self._pidfd)
            if patience.cancelled_caught:
                log.error("the API's process does not end; it is killed")
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return self._process.wait()

    def close(self) -> None:
        self.link.close()
        os.close(self._words)
        os.close(self._pidfd)


@contextmanager
def started(control: Control) -> Iterator[ControlProcess]:
    """Control's process, which does not outlive the block: it goes when its link does."""
    process = ControlProcess(control)
    try:
        yield process
    finally:
        process.close()


async def host(
    control: Control,
    opened: AbstractAsyncContextManager[Node],
    ready: Callable[[], None],
    started_up: Callable[[], None],
) -> int:
    """Serve a node to control until control ends; its exit status.

    started_up: called once control's process is there, which then owns what it was passed.
    Raises: what the node says when it cannot be opened, and what control says when it cannot start.
    """
    with started(control) as process:
        started_up()
        async with opened as node:
            try:
                with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(_tell_when_ready, process, ready)
                        await serve(node, process.link, signals)
                        tasks.cancel_scope.cancel()
            finally:
                await node.leave()  # control has ended what shall end; if it died, nothing shall
                process.link.close()
                status = await process.end()
    return status


async def _tell_when_ready(process: ControlProcess, ready: Callable[[], None]) -> None:
    await process.ready()
    ready()
