"""Processes of a session: they live in its sandbox, with all that is known of them, and nothing of them is held here.

So they outlive the call, the client and the server, and end with the sandbox.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from instavm import limits
from instavm.contract import node as contract
from instavm.contract.processes import Channel, ProcessLog, ProcessSpec, ProcessState
from instavm.control.ids import new_process_id
from instavm.control.sessions import Session, Sessions
from instavm.control.store.accounts import Tenant
from instavm.control.vms import Vm
from instavm.errors import InvalidInput, ProcessNotFound, SessionEnded
from instavm.wire.processes import StartProcess

SHOWN_CHARS: Final = 4096
"""How much of a command is kept for showing."""
HOME: Final = "/app"
ALIVE_S: Final = 15.0
"""Longest silence of `follow`."""
WINDOW_BYTES: Final = 256 << 10
"""How much of a log is on its way at one time."""


@dataclass(frozen=True, slots=True)
class Window:
    """Part of what a process wrote, as text. `pieces`: each with the position behind it."""

    state: ProcessState
    pieces: tuple[tuple[Channel, str, int], ...]
    next: int
    lost: int

    @property
    def last(self) -> bool:
        """Whether nothing comes after it."""
        return self.state.ended is not None and self.next >= self.state.log_end


class Processes:
    def __init__(self, node: contract.Processes, sessions: Sessions) -> None:
        self._node = node
        self._sessions = sessions

    async def start(self, tenant: Tenant, session_id: str, ask: StartProcess) -> ProcessState:
        """Raises: SessionNotFound, SessionEnded, RateLimitError (too many run), OutcomeUnknown, what a boot can end with."""
        vm = await self._sessions.ready(await self._sessions.get(tenant, session_id))
        argv: tuple[str, ...]
        if isinstance(ask.command, str):
            argv, shown = (ask.shell, "-c", ask.command), ask.command
        else:
            argv, shown = tuple(ask.command), shlex.join(ask.command)
        shown = shown if len(shown) <= SHOWN_CHARS else shown[: SHOWN_CHARS - 1] + "…"
        spec = ProcessSpec(new_process_id(), argv, shown, posixpath.join(HOME, ask.cwd), ask.env)
        return await self._node.start_process(vm.id, spec)

    async def list(self, tenant: Tenant, session_id: str) -> list[ProcessState]:
        """Those that run, and the latest that have ended. None when the session has no sandbox now."""
        vm = await self._vm(await self._sessions.get(tenant, session_id))
        if vm is None:
            return []
        try:
            return await self._node.processes(vm.id)
        except SessionEnded:
            return []

    async def read(
        self, tenant: Tenant, session_id: str, process_id: str, after: int, size: int = limits.PROCESS_LOG_BYTES
    ) -> Window:
        """What it wrote behind position `after`, as far as it is kept; at most `size` bytes of it.

        Raises, as all that follow: SessionNotFound, SessionEnded (killed), ProcessNotFound, OutcomeUnknown.
        """
        vm = await self._vm_of(tenant, session_id, process_id)
        with _gone(process_id):
            return _window(after, await self._node.read_process(vm.id, process_id, after, size, "now", 0.0))

    async def wait(self, tenant: Tenant, session_id: str, process_id: str, timeout_s: float) -> ProcessState:
        """Until it has ended, `timeout_s` at most."""
        vm = await self._vm_of(tenant, session_id, process_id)
        with _gone(process_id):
            return (await self._node.read_process(vm.id, process_id, 0, 0, "end", timeout_s)).state

    async def follow(
        self, tenant: Tenant, session_id: str, process_id: str, after: int
    ) -> AsyncGenerator[Window, None]:
        """Windows until the last; one with nothing in it for each time that nothing came for `ALIVE_S` seconds."""
        vm = await self._vm_of(tenant, session_id, process_id)
        heard = after
        while True:
            with _gone(process_id):
                log = await self._node.read_process(vm.id, process_id, heard, 0, "more", ALIVE_S)
                log = await self._node.read_process(vm.id, process_id, after, WINDOW_BYTES, "now", 0.0)
            window = _window(after, log)
            yield window
            if window.last:
                return
            after = window.next
            heard = log.state.log_end if not window.pieces else after

    async def write(self, tenant: Tenant, session_id: str, process_id: str, data: bytes, *, last: bool) -> ProcessState:
        """To its stdin, all or nothing. Raises: also ProcessEnded; ProcessError (closed, or it does not read)."""
        vm = await self._vm_of(tenant, session_id, process_id)
        with _gone(process_id):
            return await self._node.write_process(vm.id, process_id, data, last)

    async def signal(self, tenant: Tenant, session_id: str, process_id: str, name: str) -> ProcessState:
        """As `Node.signal_process`. Raises: also ProcessEnded."""
        vm = await self._vm_of(tenant, session_id, process_id)
        with _gone(process_id):
            return await self._node.signal_process(vm.id, process_id, limits.SIGNALS[name])

    async def _vm_of(self, tenant: Tenant, session_id: str, process_id: str) -> Vm:
        vm = await self._vm(await self._sessions.get(tenant, session_id))
        if vm is None:
            raise ProcessNotFound(f"process {process_id[:80]}: the session has no sandbox now, and so no processes")
        return vm

    async def _vm(self, session: Session) -> Vm | None:
        """The session's sandbox, if it has one; none is started for this. Raises: SessionEnded."""
        vm = session.vm
        if session.closed or (vm is not None and vm.usable):
            return await self._sessions.ready(session)
        return None


@contextmanager
def _gone(process_id: str) -> Iterator[None]:
    try:
        yield
    except SessionEnded:
        raise ProcessNotFound(f"process {process_id[:80]}: its sandbox has ended, and all its processes") from None


def _window(after: int, log: ProcessLog) -> Window:
    """As text. A character of which only the first bytes are there is left for the next window. Raises: InvalidInput."""
    if after > log.state.log_end:
        raise InvalidInput("after", after, f"{limits.ALLOWED['after']} ({log.state.log_end})")
    joined: list[tuple[Channel, bytearray]] = []
    for channel, data in log.pieces:
        if joined and joined[-1][0] == channel:
            joined[-1][1].extend(data)
        else:
            joined.append((channel, bytearray(data)))
    at = log.next - sum(len(data) for _, data in joined)
    window = Window(log.state, (), log.next, log.lost)
    if joined and not window.last and (rest := _unfinished(joined[-1][1])):
        del joined[-1][1][-rest:]
        window = replace(window, next=log.next - rest)
    pieces: list[tuple[Channel, str, int]] = []
    for channel, whole in joined:
        at += len(whole)
        if whole:
            pieces.append((channel, whole.decode(errors="replace"), at))
    return replace(window, pieces=tuple(pieces))


def _unfinished(data: bytearray) -> int:
    """How many bytes at the end begin a character that is not complete."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # not a continuation
            length = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
            return back if length > back else 0
    return 0
