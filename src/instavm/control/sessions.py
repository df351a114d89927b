"""Sessions: the durable handle for work in one sandbox at a time.

Values of environment variables live here, in memory, and nowhere else: a sandbox that is started anew after
the server was restarted comes up without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

from instavm.control.ids import new_session_id
from instavm.control.lifecycle import State
from instavm.control.quotas import Quotas
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import Store
from instavm.control.store.sessions import SessionRow, Usage, VmRow
from instavm.control.vms import Vm, Vms
from instavm.errors import NotFound, SessionEnded, SessionNotFound
from instavm.sandbox import EndReason, Started
from instavm.wire.sessions import CreateSession
from instavm.wire.vms import CreateVm

REMEMBERED: Final = 10_000
"""Open sessions without a sandbox whose `env` is kept in memory for a new one; of more, the oldest go."""


@dataclass(slots=True, eq=False)
class Session:
    """A session in memory. `past` is its latest sandbox as the database knows it, when `vm` is None."""

    row: SessionRow
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    vm: Vm | None = None
    past: VmRow | None = None
    tenant: Tenant | None = None
    """Whose it is, as the latest caller was known."""

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def closed(self) -> bool:
        return self.row.closed_at is not None

    def latest(self) -> VmRow | None:
        """Its latest sandbox: running, coming up, or ended."""
        return self.past if self.vm is None else self.vm.row()

    def count(self, execution_time_s: float, cpu_time_s: float) -> None:
        """Add one execution to the usage."""
        had = self.row.usage
        self.row = replace(
            self.row,
            usage=replace(
                had,
                execution_count=had.execution_count + 1,
                execution_time_s=had.execution_time_s + execution_time_s,
                cpu_time_s=had.cpu_time_s + cpu_time_s,
            ),
        )

    def usage(self) -> Usage:
        """So far, a running sandbox included."""
        up = 0.0 if self.vm is None else self.vm.uptime_s()
        return replace(self.row.usage, vm_seconds=self.row.usage.vm_seconds + up)


class Sessions:
    def __init__(self, store: Store, vms: Vms, quotas: Quotas) -> None:
        self._store = store
        self._rows = store.sessions
        self._vms = vms
        self._quotas = quotas
        self._known: dict[str, Session] = {}

    async def create(self, tenant: Tenant, ask: CreateSession | CreateVm, session_id: str | None = None) -> Session:
        """Make a session, let its sandbox begin to boot, and return as soon as both are recorded.

        session_id: set aside for it; when a server that is no more has made it already, it is that one.
        Raises: ForbiddenError, QuotaExceededError, NoCapacity, IsolationTooWeak; then nothing was made.
        """
        if session_id is not None and (made := await self._recall(session_id)) is not None:
            return made
        self._vms.refuse_weaker(ask.require_isolation)
        self._quotas.admit(tenant, ask.vcpu_count, ask.memory_mb, ask.vm_lifetime_seconds)
        row = SessionRow(
            id=session_id or new_session_id(),
            tenant_id=tenant.id,
            created_at=datetime.now(UTC),
            closed_at=None,
            lifetime_s=ask.vm_lifetime_seconds,
            vcpus=ask.vcpu_count,
            memory_mib=ask.memory_mb,
            image="default",
            metadata=ask.metadata,
            env_keys=tuple(sorted(ask.env)),
            options={
                **(ask.options() if isinstance(ask, CreateVm) else {}),
                **({} if ask.require_isolation is None else {"require_isolation": str(ask.require_isolation)}),
            },
        )
        session = Session(row, ask.env, tenant=tenant)
        self._rows.add(row)
        self._remember(session)
        session.vm = self._vms.spawn(row, ask.env)
        await self._store.journal.written()
        return session

    async def get(self, tenant: Tenant, session_id: str) -> Session:
        """Raises: SessionNotFound, also for a session of somebody else: they look the same from outside."""
        session = self._known.get(_canonical(session_id)) or await self._recall(_canonical(session_id))
        if session is None or session.row.tenant_id != tenant.id:
            raise SessionNotFound(f"there is no session {session_id[:80]}")
        session.tenant = tenant
        return session

    async def of_vm(self, tenant: Tenant, vm_id: str) -> tuple[Session, VmRow]:
        """A sandbox of this tenant, up or long gone, with its session. Raises: NotFound."""
        vm = self._vms.get(vm_id)
        if vm is not None and vm.tenant_id == tenant.id:
            return await self.get(tenant, vm.session_id), vm.row()
        found = await self._rows.by_vm(vm_id)
        if found is None or found[0].tenant_id != tenant.id:
            raise NotFound(f"there is no VM {vm_id[:80]}")
        return await self.get(tenant, found[0].id), found[1]

    async def all_vms(self, tenant: Tenant, limit: int) -> list[tuple[SessionRow, VmRow]]:
        """Every sandbox a tenant ever had, newest first."""
        return await self._rows.vms_of(tenant.id, limit)

    async def relabel(self, session: Session, metadata: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
        """Replace the metadata (None = leave it) and set options; recorded when it returns."""
        kept = session.row.metadata if metadata is None else metadata
        session.row = replace(session.row, metadata=kept, options={**session.row.options, **options})
        await self._store.journal.written(self._rows.relabel(session.row))

    def adopt(self, row: SessionRow, vm: VmRow, started: Started) -> None:
        """A sandbox of an earlier server lives on. Its variables are in there; for another one they are lost."""
        session = Session(row)
        session.vm = self._vms.adopt(row, vm, started)
        self._remember(session)

    def adopted(self, session_id: str) -> Session | None:
        """A session whose sandbox was adopted."""
        session = self._known.get(session_id)
        return session if session is not None and session.vm is not None else None

    def begin(self, session: Session) -> Vm:
        """The session's sandbox, up or coming up; a new one when the last one ended.

        Raises: SessionEnded (killed); QuotaExceededError, NoCapacity.
        """
        self._refuse_closed(session)
        vm = session.vm
        return self._respawn(session) if vm is None or not vm.usable else vm

    async def ready(self, session: Session) -> Vm:
        """The session's sandbox, ready for code. Starts a new one when the last one ended and nobody killed
        it.

        Raises: SessionEnded (killed); BootFailed, NoCapacity, HostNotReady, DiskFull.
        """
        vm = self.begin(session)
        await vm.settled.wait()
        self._refuse_closed(session)
        if vm.error is not None:
            raise vm.error.with_traceback(None)
        return vm

    async def kill(self, session: Session) -> str | None:
        """Close a session and end its sandbox; returns its id once nothing is left of it. Twice is fine."""
        vm = session.vm
        if not session.closed:
            session.row = replace(session.row, closed_at=datetime.now(UTC))
            mark = self._rows.close(session.id, datetime.now(UTC))
            if vm is not None:
                vm.ask_end(EndReason.KILLED)
            await self._store.journal.written(mark)
        if vm is not None:
            await vm.gone.wait()
        latest = session.latest()
        self._known.pop(session.id, None)
        return None if latest is None else latest.id

    def count(self, session: Session, execution_time_s: float, cpu_time_s: float) -> None:
        """Record one execution."""
        session.count(execution_time_s, cpu_time_s)
        self._rows.used(session.id, execution_time_s=execution_time_s, cpu_time_s=cpu_time_s)

    def with_sandbox(self, tenant: Tenant, wanted: Mapping[str, Any], limit: int) -> list[Session]:
        """Sessions whose sandbox is up or coming up and whose metadata contains `wanted`, newest first."""
        mine = (
            session
            for session in reversed(self._known.values())
            if session.row.tenant_id == tenant.id
            and session.vm is not None
            and session.vm.usable
            and contains(session.row.metadata, wanted)
        )
        return [session for session, _ in zip(mine, range(limit), strict=False)]

    def _respawn(self, session: Session) -> Vm:
        if session.vm is not None:
            usage = replace(session.row.usage, vm_seconds=session.usage().vm_seconds)
            session.row = replace(session.row, usage=usage)
        row = session.row
        if session.tenant is not None:
            self._quotas.admit(session.tenant, row.vcpus, row.memory_mib, row.lifetime_s)
        session.vm = self._vms.spawn(row, session.env)
        self._remember(session)
        return session.vm

    async def _recall(self, session_id: str) -> Session | None:
        found = await self._rows.load(session_id)
        if found is None:
            return None
        session = Session(found[0], past=found[1])
        if session.closed:
            return session
        self._remember(self._known.get(session_id) or session)
        return self._known[session_id]

    def _remember(self, session: Session) -> None:
        self._known[session.id] = session
        if len(self._known) > REMEMBERED + len(self._vms):
            idle = (s for s in self._known.values() if s.vm is None or s.vm.lifecycle.state is State.ENDED)
            if (oldest := next(idle, None)) is not None:
                del self._known[oldest.id]

    def _refuse_closed(self, session: Session) -> None:
        if session.closed:
            raise SessionEnded(f"session {session.id} was killed; make a new one")


def contains(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether every pair of `wanted` is in `have`; objects inside objects are compared the same way."""
    return all(
        key in have
        and (
            contains(have[key], value)
            if isinstance(value, dict) and isinstance(have[key], dict)
            else have[key] == value
        )
        for key, value in wanted.items()
    )


def _canonical(session_id: str) -> str:
    """A UUID in the one spelling that is stored; anything else as it came, which no session has."""
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        return session_id
