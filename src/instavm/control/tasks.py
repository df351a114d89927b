"""Tasks: code that runs on in its sandbox whether or not a client waits for it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from anyio.abc import TaskGroup

from instavm import limits
from instavm.contract.executions import Outcome, Stream
from instavm.control.executions import Executions
from instavm.control.ids import new_task_id
from instavm.control.sessions import Session, Sessions
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import Store
from instavm.control.store.tasks import TaskRow
from instavm.control.vms import Vm
from instavm.errors import InstaVMError, NotFound, OutcomeUnknown, RateLimitError, SessionEnded
from instavm.wire.executions import Execute
from instavm.wire.sessions import CreateSession
from instavm.wire.tasks import ExecuteAsync

log = logging.getLogger(__name__)

BEYOND_S: Final = 3600.0
"""Added to what is left of a lifetime, for a task that shall run until its sandbox ends: it never gets there."""

_LOST: Final = "[instavm] the server was restarted while this ran: its end is not known\n"


class Kept:
    """What a task has printed so far: head and tail, for one that does not come to its end."""

    def __init__(self) -> None:
        self._streams: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    def add(self, stream: Stream, data: bytes) -> None:
        kept = self._streams[stream]
        kept += data
        if len(kept) > 2 * limits.TASK_OUTPUT_BYTES:
            half = limits.TASK_OUTPUT_BYTES // 2
            kept[half:-half] = b"\n... output left out ...\n"

    def text(self, stream: Stream) -> str:
        return _cut(self._streams[stream].decode(errors="replace"))


class Tasks:
    """Owns one background task per task under way; what has ended is in the store alone."""

    def __init__(self, store: Store, sessions: Sessions, executions: Executions, tasks: TaskGroup) -> None:
        self._rows = store.tasks
        self._accounts = store.accounts
        self._journal = store.journal
        self._sessions = sessions
        self._executions = executions
        self._tasks = tasks
        self._under_way: dict[str, TaskRow] = {}

    async def begin(self, tenant: Tenant, ask: ExecuteAsync) -> TaskRow:
        """Record a task and let it run; its id is good at once. Raises: SessionNotFound, SessionEnded, RateLimitError."""
        mine = Counter(row.tenant_id for row in self._under_way.values())[tenant.id]
        if mine >= limits.TASKS_MAX:
            raise RateLimitError(f"this account has {mine} tasks under way, which is the limit; wait for some")
        if ask.session_id is None:
            session = await self._sessions.create(tenant, CreateSession())
        else:
            session = await self._sessions.get(tenant, ask.session_id)
        if session.closed:
            raise SessionEnded(f"session {session.id} was killed; make a new one")
        row = TaskRow(
            new_task_id(),
            tenant.id,
            session.id,
            ask.language,
            datetime.now(UTC),
            command=ask.command,
            timeout_s=ask.timeout,
        )
        self._under_way[row.id] = row
        await self._journal.written(self._rows.add(row))
        self._tasks.start_soon(self._run, session, row, name=row.id)
        return row

    async def get(self, tenant: Tenant, task_id: str) -> TaskRow:
        """Raises: NotFound, also for a task of somebody else."""
        row = self._under_way.get(task_id)
        if row is None or row.tenant_id != tenant.id:
            row = await self._rows.load(tenant.id, task_id)
        if row is None:
            raise NotFound(f"there is no task {task_id[:80]}")
        return row

    async def list(self, tenant: Tenant, limit: int) -> list[TaskRow]:
        """Newest first."""
        return [self._under_way.get(row.id, row) for row in await self._rows.of_tenant(tenant.id, limit)]

    async def take_up(self) -> None:
        """Tasks of a server that is no more. Called once, at first.

        One that was never sent runs now. One whose sandbox lives on is waited for again, and begins if it had not. Of one
        whose sandbox is gone nobody knows whether it ran, so it does not run again.
        """
        for row in await self._rows.unfinished():
            if row.vm_id is None and row.command is not None:
                await self._run_at_last(row)
                continue
            session = self._sessions.adopted(row.session_id)
            resting = await self._sessions.resting(row.session_id)
            if resting is not None and row.vm_id is not None:
                self._under_way[row.id] = row
                self._tasks.start_soon(self._rest, resting, row, name=row.id)
            elif session is None or session.vm is None or session.vm.id != row.vm_id:
                self._rows.change(_ended(row, "killed", reason="node_lost", stderr=_LOST))
            else:
                self._under_way[row.id] = row
                self._tasks.start_soon(self._rejoin, session, session.vm, row, name=row.id)

    async def _run_at_last(self, row: TaskRow) -> None:
        session = await self._sessions.recall(row.session_id)
        if session is None or session.closed:
            self._rows.change(_ended(row, "killed", reason="killed", stderr="[instavm] its session was killed\n"))
            return
        session.tenant = session.tenant or await self._accounts.tenant(row.tenant_id)
        self._under_way[row.id] = row
        self._tasks.start_soon(self._run, session, row, name=row.id)

    async def _rejoin(self, session: Session, vm: Vm, row: TaskRow) -> None:
        try:
            outcome = await self._executions.rejoin(session, vm, _command(row, vm), row.id)
            lost = _ended(row, "killed", reason="node_lost", stderr=_LOST)
            self._rows.change(lost if outcome is None else _finished(row, outcome))
        except InstaVMError as exc:
            if vm.lifecycle.why is not None or not vm.gone.is_set():
                why = str(vm.lifecycle.why or exc.code)
                self._rows.change(_ended(row, "killed", reason=why, stderr=f"[instavm] {exc}\n"))
        finally:
            del self._under_way[row.id]

    async def _rest(self, session: Session, row: TaskRow) -> None:
        """A task whose sandbox was put to rest by a server before this one."""
        ended = await self._after_rest(session, row)
        if ended is not None:
            self._rows.change(ended)
        del self._under_way[row.id]

    async def _after_rest(self, session: Session, row: TaskRow) -> TaskRow | None:
        """Wait until its sandbox is brought back, and then for its end. Returns: None when the server goes before that."""
        while True:
            while session.at_rest() is not None and not session.closed:
                await session.awake.wait()
                if session.vm is not None:
                    await session.vm.settled.wait()
            vm = session.vm
            if session.closed or vm is None:
                return _ended(
                    row, "killed", reason="killed", stderr="[instavm] its sandbox was killed while it was suspended\n"
                )
            row = self._under_way[row.id] = replace(row, vm_id=vm.id)
            self._rows.change(row)
            try:
                outcome = await self._executions.rejoin(session, vm, _command(row, vm), row.id)
                lost = _ended(row, "killed", reason="node_lost", stderr=_LOST)
                return lost if outcome is None else _finished(row, outcome)
            except InstaVMError as exc:
                if vm.at_rest:
                    continue
                if vm.lifecycle.why is None and vm.gone.is_set():
                    return None
                return _ended(row, "killed", reason=str(vm.lifecycle.why or exc.code), stderr=f"[instavm] {exc}\n")

    async def _run(self, session: Session, row: TaskRow) -> None:
        try:
            ended = await self._outcome(session, row)
        except Exception:
            log.exception("task %s failed in a way that nobody foresaw", row.id)
            ended = _ended(row, "failed", reason="internal", stderr="[instavm] internal error\n")
        if ended is not None:
            self._rows.change(ended)
        del self._under_way[row.id]
        await self._rows.prune(row.tenant_id)

    async def _outcome(self, session: Session, row: TaskRow) -> TaskRow | None:
        """Returns: None when the server goes and leaves the task to itself."""
        vm: Vm | None = None
        kept = Kept()
        try:
            vm = await self._sessions.ready(session)
            row = self._under_way[row.id] = replace(row, status="running", vm_id=vm.id)
            await self._journal.written(self._rows.change(row))  # before it is sent: without this it was not
            ran = await self._executions.run(session, _command(row, vm), kept.add, task=row.id)
            ended = _finished(row, ran.outcome)
            if (
                ended.exit_code and vm.asked_why is not None
            ):  # it was ended, and its last words came through all the same
                return replace(ended, status="killed", reason=str(vm.asked_why))
            return ended
        except (SessionEnded, OutcomeUnknown) as exc:
            if vm is not None and vm.at_rest:
                return await self._after_rest(session, row)
            if vm is not None and vm.lifecycle.why is None and vm.gone.is_set():
                return None
            why = None if vm is None else vm.lifecycle.why
            row = replace(row, stdout=kept.text("stdout"), stderr=kept.text("stderr"))
            return _ended(row, "killed", reason=str(why or exc.code), stderr=f"[instavm] {exc}\n")
        except InstaVMError as exc:
            return _ended(row, "failed", reason=exc.code, stderr=f"[instavm] {exc}\n")


def _command(row: TaskRow, vm: Vm) -> Execute:
    timeout_s = min(math.inf if row.timeout_s is None else row.timeout_s, (vm.remaining_s() or 0.0) + BEYOND_S)
    return Execute.model_construct(
        command=row.command or "", session_id=row.session_id, language=row.language, timeout=timeout_s
    )


def _ended(row: TaskRow, status: str, *, reason: str, stderr: str) -> TaskRow:
    told = row.stderr + stderr
    return replace(row, status=status, reason=reason, stderr=told, finished_at=datetime.now(UTC), command=None)


def _finished(row: TaskRow, outcome: Outcome) -> TaskRow:
    word = "timeout" if outcome.timed_out else "failed" if outcome.exit_code else "completed"
    out, err = _cut(outcome.stdout), _cut(outcome.stderr)
    return replace(
        row,
        status=word,
        reason=outcome.reason,
        finished_at=datetime.now(UTC),
        command=None,
        exit_code=outcome.exit_code,
        stdout=out,
        stderr=err,
        truncated=outcome.truncated or (out, err) != (outcome.stdout, outcome.stderr),
        execution_time_s=outcome.execution_time_s,
        cpu_time_s=outcome.cpu_time_s,
    )


def _cut(text: str) -> str:
    """Head and tail, `TASK_OUTPUT_BYTES` characters at most."""
    half = limits.TASK_OUTPUT_BYTES // 2
    over = len(text) - 2 * half
    return text if over <= 0 else f"{text[:half]}\n… {over} characters left out …\n{text[-half:]}"
