"""Sessions, their sandboxes and the events of both. Writes go through the journal, reads to the tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Row, and_, bindparam, insert, or_, select, update
from sqlalchemy.engine import Connection

from instavm.contract.isolation import Tier
from instavm.contract.sandboxes import EndReason, Started
from instavm.control.lifecycle import State
from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal, Write
from instavm.control.store.schema import events, sessions, vms

KEY: BindParameter[str] = bindparam("key")
SESSION_COLUMNS = ("id", "tenant_id", "created_at", "closed_at", "lifetime_s", "vcpus", "memory_mib", "image")
ADD_SESSION = insert(sessions)
ADD_VM = insert(vms)
ADD_EVENT = insert(events)
CLOSE_SESSION = (
    update(sessions).where(sessions.c.id == KEY, sessions.c.closed_at.is_(None)).values(closed_at=bindparam("at"))
)
COUNT_EXECUTION = (
    update(sessions)
    .where(sessions.c.id == KEY)
    .values(
        execution_count=sessions.c.execution_count + 1,
        execution_time_s=sessions.c.execution_time_s + bindparam("wall"),
        cpu_time_s=sessions.c.cpu_time_s + bindparam("cpu"),
    )
)
COUNT_VM_SECONDS = (
    update(sessions).where(sessions.c.id == KEY).values(vm_seconds=sessions.c.vm_seconds + bindparam("up"))
)
MOVE_VM = update(vms).where(vms.c.id == KEY, vms.c.state == bindparam("was"))
SET_VM = update(vms).where(vms.c.id == KEY)
CHANGE = (
    update(sessions)
    .where(sessions.c.id == KEY, sessions.c.closed_at.is_(None))
    .values(metadata=bindparam("labels"), options=bindparam("chosen"), lifetime_s=bindparam("lifetime"))
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Sums over a session's life. Times are seconds."""

    execution_count: int = 0
    execution_time_s: float = 0.0
    cpu_time_s: float = 0.0
    vm_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SessionRow:
    id: str
    tenant_id: str
    created_at: datetime
    closed_at: datetime | None
    lifetime_s: int
    vcpus: int
    memory_mib: int
    image: str
    metadata: Mapping[str, Any]
    env_keys: tuple[str, ...]
    usage: Usage = Usage()
    options: Mapping[str, Any] = field(default_factory=dict)
    """What was asked for on top, as it came: `wire.vms.Options`."""


@dataclass(frozen=True, slots=True)
class VmRow:
    """What is known of one sandbox. `expires_at` and `started_at` are None until it was ready."""

    id: str
    session_id: str
    state: State
    why: EndReason | None
    created_at: datetime
    started_at: datetime | None = None
    expires_at: datetime | None = None
    ended_at: datetime | None = None
    start: Started | None = None
    detail: str | None = None
    """What happened at its end, in words."""
    console: str | None = None
    """The last lines of its console, where it did not end on purpose."""


class SessionRows:
    def __init__(self, engine: Engine, journal: Journal) -> None:
        self._engine = engine
        self._journal = journal

    async def load(self, tenant_id: str | None, session_id: str) -> tuple[SessionRow, VmRow | None] | None:
        """A session of this tenant (None = of any) and its latest sandbox. What is still queued is written first."""
        await self._journal.written()
        return await self._engine.run(lambda connection: _load(connection, tenant_id, session_id))

    async def events(self, session_id: str) -> list[tuple[str, str | None, str | None]]:
        """`(event, vm_id, reason)` in the order they happened."""
        await self._journal.written()
        ask = select(events.c.event, events.c.vm_id, events.c.reason).where(events.c.session_id == session_id)
        rows = await self._engine.run(lambda connection: connection.execute(ask.order_by(events.c.seq)).all())
        return [(row.event, row.vm_id, row.reason) for row in rows]

    def add(self, row: SessionRow) -> None:
        values = {name: getattr(row, name) for name in SESSION_COLUMNS}
        values |= {"metadata": dict(row.metadata), "options": dict(row.options), "env_keys": list(row.env_keys)}
        self._journal.append(Write(ADD_SESSION, values), _event(row.created_at, row.id, None, "session.created"))

    def close(self, session_id: str, at: datetime) -> int:
        """Returns: the journal's mark, to wait until it is durable."""
        return self._journal.append(
            Write(CLOSE_SESSION, {"key": session_id, "at": at}, f"session {session_id} is open"),
            _event(at, session_id, None, "session.closed"),
        )

    def change(self, row: SessionRow, vm: VmRow | None) -> int:
        """Record changed metadata, options and lifetime. vm: its sandbox, if that ends at another time now.

        Returns: the journal's mark.
        """
        values = {"labels": dict(row.metadata), "chosen": dict(row.options), "lifetime": row.lifetime_s}
        writes = [Write(CHANGE, {"key": row.id, **values}, f"session {row.id} is open")]
        if vm is not None:
            writes.append(Write(SET_VM, {"key": vm.id, "expires_at": vm.expires_at}, f"VM {vm.id} is recorded"))
        return self._journal.append(*writes)

    def used(self, session_id: str, *, execution_time_s: float, cpu_time_s: float) -> None:
        """Count one execution."""
        values = {"key": session_id, "wall": execution_time_s, "cpu": cpu_time_s}
        self._journal.append(Write(COUNT_EXECUTION, values))

    def add_vm(self, row: VmRow) -> int:
        """Record a sandbox that is coming up. Returns: the journal's mark."""
        values = {
            "id": row.id,
            "session_id": row.session_id,
            "state": row.state,
            "created_at": row.created_at,
        }
        return self._journal.append(
            Write(ADD_VM, values), _event(row.created_at, row.session_id, row.id, f"vm.{row.state}")
        )

    def move_vm(self, row: VmRow, was: State, at: datetime, detail: str | None, vm_seconds: float) -> None:
        """Record one step of a sandbox's life: compare and set, so that no step can be taken twice.

        vm_seconds: how long it was up; added to the session's sum when the sandbox has ended or is at rest.
        """
        writes = [
            _step(row.id, was, _changing(row)),
            _event(at, row.session_id, row.id, f"vm.{row.state}", reason=row.why, detail=detail),
        ]
        if row.state in (State.ENDED, State.SUSPENDED) and vm_seconds:
            writes.append(Write(COUNT_VM_SECONDS, {"key": row.session_id, "up": vm_seconds}))
        self._journal.append(*writes)

    def at_rest(self, row: VmRow) -> None:
        """Record what became of a sandbox that was being put to rest when the server was killed."""
        self._journal.append(
            _step(row.id, row.state, {"state": State.SUSPENDED, "why": None, "ended_at": None}),
            _event(datetime.now(UTC), row.session_id, row.id, "vm.suspended"),
        )

    async def resting(self, tenant_id: str) -> frozenset[str]:
        """The ids of a tenant's sandboxes that are suspended."""
        await self._journal.written()
        ask = select(vms.c.id).join(sessions, sessions.c.id == vms.c.session_id)
        mine = ask.where(sessions.c.tenant_id == tenant_id, vms.c.state == State.SUSPENDED)
        return frozenset(await self._engine.run(lambda connection: connection.execute(mine).scalars().all()))

    async def unended(self) -> list[tuple[SessionRow, VmRow]]:
        """Every sandbox that a server before this one has not seen the end of, with its session."""
        await self._journal.written()
        return await self._engine.run(lambda connection: _joined(connection, vms.c.state != State.ENDED))

    async def vms_of(
        self, tenant_id: str, limit: int, states: Collection[tuple[State, EndReason | None]] | None = None
    ) -> list[tuple[SessionRow, VmRow]]:
        """All sandboxes a tenant ever had, or those in one of `states`, newest first."""
        await self._journal.written()
        mine = sessions.c.tenant_id == tenant_id
        if states is not None:
            mine &= or_(
                *(
                    and_(vms.c.state == state, vms.c.why.is_(None) if why is None else vms.c.why == why)
                    for state, why in states
                )
            )
        return await self._engine.run(lambda connection: _joined(connection, mine, limit))

    async def forget_consoles(self, before: datetime) -> None:
        """What the consoles of sandboxes said that ended before that."""
        old = update(vms).where(vms.c.ended_at < before, vms.c.console.is_not(None)).values(console=None)
        await self._engine.run(lambda connection: connection.execute(old))

    async def by_vm(self, tenant_id: str, vm_id: str) -> tuple[SessionRow, VmRow] | None:
        mine = (vms.c.id == vm_id) & (sessions.c.tenant_id == tenant_id)
        await self._journal.written()
        found = await self._engine.run(lambda connection: _joined(connection, mine))
        return found[0] if found else None

    def lose_vm(self, row: VmRow, why: EndReason, detail: str) -> None:
        """Record the end of a sandbox that nobody was there to see."""
        now, reason = datetime.now(UTC), row.why or why
        self._journal.append(
            _step(row.id, row.state, {"state": State.ENDED, "why": reason, "ended_at": now, "detail": detail}),
            _event(now, row.session_id, row.id, "vm.ended", reason=reason, detail=detail),
        )


def _step(vm_id: str, was: State, values: Mapping[str, Any]) -> Write:
    return Write(MOVE_VM, {"key": vm_id, "was": was, **values}, f"VM {vm_id} is {was}")


def _joined(
    connection: Connection, which: ColumnElement[bool], limit: int | None = None
) -> list[tuple[SessionRow, VmRow]]:
    ask = select(vms).join(sessions, sessions.c.id == vms.c.session_id).where(which).order_by(vms.c.created_at.desc())
    found = connection.execute(ask.limit(limit)).all()
    ids = {row.session_id for row in found}
    owners = {row.id: _session(row) for row in connection.execute(select(sessions).where(sessions.c.id.in_(ids)))}
    return [(owners[row.session_id], _vm(row)) for row in found]


def _load(connection: Connection, tenant_id: str | None, session_id: str) -> tuple[SessionRow, VmRow | None] | None:
    mine = sessions.c.id == session_id
    if tenant_id is not None:
        mine &= sessions.c.tenant_id == tenant_id
    row = connection.execute(select(sessions).where(mine)).one_or_none()
    if row is None:
        return None
    rests = (vms.c.state == State.SUSPENDED).desc()  # one that could not be resumed comes after it, and is no more
    latest = select(vms).where(vms.c.session_id == session_id).order_by(rests, vms.c.created_at.desc()).limit(1)
    vm = connection.execute(latest).one_or_none()
    return _session(row), None if vm is None else _vm(vm)


def _event(
    at: datetime,
    session_id: str,
    vm_id: str | None,
    event: str,
    *,
    reason: EndReason | None = None,
    detail: str | None = None,
) -> Write:
    values = {"at": at, "session_id": session_id, "vm_id": vm_id, "event": event, "reason": reason}
    return Write(ADD_EVENT, {**values, "detail": detail})


def _changing(row: VmRow) -> dict[str, Any]:
    """What a step can change."""
    start = None if row.start is None else asdict(row.start) | {"steps_ms": dict(row.start.steps_ms)}
    return {
        "state": row.state,
        "why": row.why,
        "started_at": row.started_at,
        "expires_at": row.expires_at,
        "ended_at": row.ended_at,
        "start": start,
        "detail": row.detail,
        "console": row.console,
    }


def _session(row: Row[Any]) -> SessionRow:
    return SessionRow(
        id=row.id,
        tenant_id=row.tenant_id,
        created_at=row.created_at,
        closed_at=row.closed_at,
        lifetime_s=row.lifetime_s,
        vcpus=row.vcpus,
        memory_mib=row.memory_mib,
        image=row.image,
        metadata=row.metadata,
        env_keys=tuple(row.env_keys),
        usage=Usage(row.execution_count, row.execution_time_s, row.cpu_time_s, row.vm_seconds),
        options=row.options,
    )


def _vm(row: Row[Any]) -> VmRow:
    return VmRow(
        id=row.id,
        session_id=row.session_id,
        state=State(row.state),
        why=None if row.why is None else EndReason(row.why),
        created_at=row.created_at,
        started_at=row.started_at,
        expires_at=row.expires_at,
        ended_at=row.ended_at,
        start=None if row.start is None else Started(**{**row.start, "tier": Tier(row.start["tier"])}),
        detail=row.detail,
        console=row.console,
    )
