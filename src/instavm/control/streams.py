"""Executions that are followed while they run: what they print is kept, bounded, for a reader who comes and goes."""

from __future__ import annotations

import codecs
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, Literal

import anyio
from anyio.abc import TaskGroup

from instavm import limits
from instavm.contract.executions import Outcome
from instavm.contract.executions import Stream as Channel
from instavm.control.bounds import Bound
from instavm.control.executions import Executions, Ran
from instavm.control.store.accounts import Tenant
from instavm.errors import InstaVMError, NotFound
from instavm.wire.executions import Execute

log = logging.getLogger(__name__)

KEPT_BYTES: Final = 4 << 20
"""Of one execution's events; of more, the oldest go, and a reader who has not had them is told so by the numbers."""
EXIT_CANCELLED: Final = 130
KEPT_S: Final = 900.0
"""How long the end of an execution can still be asked for."""
KEPT_MAX: Final = 50
"""Executions of one tenant that are remembered; of more, the oldest that have ended go."""

Kind = Literal["stdout", "stderr", "output", "result", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """`number` counts from 1, without gaps."""

    number: int
    kind: Kind
    told: str | Ran | InstaVMError
    """Text of stdout and stderr, the JSON of an output; how it ended, without the output that was told before."""


class Followed:
    """One execution and its events."""

    def __init__(self, tenant_id: str, session_id: str | None, language: str) -> None:
        self.id = f"exe_{secrets.token_hex(12)}"
        self.tenant_id = tenant_id
        self.session_id = session_id
        self.language = language
        self.ended_at: float | None = None
        self.scope = anyio.CancelScope()
        self.cancelled = False
        self._began = time.monotonic()
        self._events: deque[tuple[Event, int]] = deque()
        self._size = 0
        self._count = 0
        self._news = anyio.Event()
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = {"stdout": decoder("replace"), "stderr": decoder("replace")}

    def take(self, channel: Channel, data: bytes) -> None:
        """A piece of output, as the node passes it on."""
        if channel == "output":
            self._add("output", data.decode(errors="replace"), len(data))
        elif text := self._decoders[channel].decode(data):
            self._add(channel, text, len(data))

    def end(self, how: Ran | InstaVMError) -> None:
        self.ended_at = time.monotonic()
        self._add("result" if isinstance(how, Ran) else "error", how, 0)

    def took_s(self) -> float:
        return time.monotonic() - self._began

    async def after(self, number: int) -> list[Event]:
        """What came after event `number`; waits while there is nothing. Nothing after the last event is []."""
        while True:
            found = [event for event, _ in self._events if event.number > number]
            if found or self.ended_at is not None:
                return found
            await self._news.wait()

    def _add(self, kind: Kind, told: str | Ran | InstaVMError, size_bytes: int) -> None:
        self._count += 1
        self._events.append((Event(self._count, kind, told), size_bytes))
        self._size += size_bytes
        while self._size > KEPT_BYTES and len(self._events) > 1:
            self._size -= self._events.popleft()[1]
        self._news.set()
        self._news = anyio.Event()


class Streams:
    """Owns one task for each followed execution: it goes on when nobody follows."""

    def __init__(self, executions: Executions, tasks: TaskGroup) -> None:
        self._executions = executions
        self._tasks = tasks
        self._known: dict[str, Followed] = {}
        self._bound = Bound("streamed executions", limits.STREAMS_MAX)

    def begin(self, tenant: Tenant, ask: Execute) -> Followed:
        """Run a command; what becomes of it, and every later error, is told by its events.

        Raises: RateLimitError: too many of this account run or wait.
        """
        self._bound.take(tenant.id)
        self._forget(tenant.id)
        followed = Followed(tenant.id, ask.session_id, ask.language)
        self._known[followed.id] = followed
        self._tasks.start_soon(self._run, tenant, ask, followed, name=followed.id)
        return followed

    def get(self, tenant: Tenant, execution_id: str) -> Followed:
        """Raises: NotFound, also for an execution of somebody else."""
        followed = self._known.get(execution_id)
        if followed is None or followed.tenant_id != tenant.id:
            raise NotFound(f"there is no execution {execution_id[:80]} that can be followed")
        return followed

    def cancel(self, tenant: Tenant, execution_id: str) -> Followed:
        """Have it stopped; its last event says so. One that has ended stays as it is. Raises: NotFound."""
        followed = self.get(tenant, execution_id)
        if followed.ended_at is None:
            followed.cancelled = True
            followed.scope.cancel()
        return followed

    async def _run(self, tenant: Tenant, ask: Execute, followed: Followed) -> None:
        try:
            await self._run_to_end(tenant, ask, followed)
        finally:
            self._bound.release(tenant.id)

    async def _run_to_end(self, tenant: Tenant, ask: Execute, followed: Followed) -> None:
        try:
            with followed.scope:
                ran = await self._executions.execute(tenant, ask, followed.take)
                followed.end(replace(ran, outcome=replace(ran.outcome, stdout="", stderr="", outputs=())))
        except InstaVMError as exc:
            followed.end(exc)
        except Exception:
            log.exception("execution %s failed in a way that nobody foresaw", followed.id)
            followed.end(InstaVMError("internal error"))
        if followed.cancelled and followed.ended_at is None:
            outcome = Outcome("", "", EXIT_CANCELLED, followed.took_s(), 0.0, reason="cancelled")
            followed.end(Ran(ask.session_id or "", "", outcome, None))

    def _forget(self, tenant_id: str) -> None:
        now = time.monotonic()
        ended = [one for one in self._known.values() if one.ended_at is not None]
        old = [one for one in ended if one.ended_at is not None and now - one.ended_at > KEPT_S]
        mine = [one for one in ended if one.tenant_id == tenant_id and one not in old]
        over = sum(one.tenant_id == tenant_id for one in self._known.values()) - KEPT_MAX
        for one in (*old, *mine[: max(0, over)]):
            del self._known[one.id]
