"""Sessions: the durable handle for work in one sandbox at a time.

Values of environment variables live here, in memory, and nowhere else: a sandbox that is started anew after
the server was restarted comes up without them.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import anyio

from instavm.contract.egress import NOTHING, Egress
from instavm.contract.node import Snapshots
from instavm.contract.sandboxes import EndReason, Started
from instavm.contract.snapshots import Stored
from instavm.control.ids import new_session_id
from instavm.control.lifecycle import STATES_OF_WORD, State
from instavm.control.quotas import Quotas
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import Store
from instavm.control.store.sessions import SessionRow, Usage, VmRow
from instavm.control.vms import Vm, Vms
from instavm.errors import Conflict, HostNotReady, NotFound, SessionEnded, SessionNotFound, SessionSuspended
from instavm.wire.sessions import CreateSession
from instavm.wire.vms import CreateVm

log = logging.getLogger(__name__)

REMEMBERED: Final = 10_000
"""Open sessions without a sandbox whose `env` is kept in memory for a new one; of more, the oldest go."""


@dataclass(slots=True, eq=False)
class Session:
    """A session in memory. `past` is its latest sandbox as the database knows it, when `vm` is None."""

    row: SessionRow
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    vm: Vm | None = None
    past: VmRow | None = None
    awake: anyio.Event = field(default_factory=anyio.Event)
    """Set when a sandbox at rest is brought back, or killed."""
    tenant: Tenant | None = None
    """Whose it is, as the latest caller was known."""
    egress: Egress | None = None
    """What its next sandbox may reach; None = what the server's default is."""
    resting_egress: Egress | None = None
    """What its sandbox at rest could reach, when it was put to rest by an earlier server."""

    @property
    def id(self) -> str:
        return self.row.id

    @property
    def closed(self) -> bool:
        return self.row.closed_at is not None

    def latest(self) -> VmRow | None:
        """Its latest sandbox: running, coming up, at rest, or ended."""
        return self.at_rest() or (self.past if self.vm is None else self.vm.row())

    def at_rest(self) -> VmRow | None:
        """Its sandbox, if that is suspended: also one that was to go on from it and did not come up is no more."""
        if self.vm is None:
            return self.past if self.past is not None and self.past.state is State.SUSPENDED else None
        if self.vm.at_rest:
            return self.vm.row()
        return self.vm.resumes if self.vm.up_since is None and not self.vm.usable else None

    def wake(self) -> None:
        """Tell those who wait for a sandbox at rest to look again."""
        self.awake.set()
        self.awake = anyio.Event()

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
    def __init__(self, store: Store, vms: Vms, quotas: Quotas, node: Snapshots, default_egress: Egress = NOTHING) -> None:
        self._store = store
        self._rows = store.sessions
        self._vms = vms
        self._quotas = quotas
        self.default_egress = default_egress
        self._forget = node.forget
        self._stored = node.stored
        self._known: dict[str, Session] = {}

    async def create(
        self, tenant: Tenant, ask: CreateSession | CreateVm, session_id: str | None = None, image: str | None = None
    ) -> Session:
        """Make a session, let its sandbox begin to boot, and return as soon as both are recorded.

        The default lifetime is cut to the tenant's quota.

        image: the id of a disk snapshot that the caller may use; None = the default image.
        session_id: set aside for it; when a server that is no more has made it already, it is that one.
        Raises: ForbiddenError, QuotaExceededError, NoCapacity, IsolationTooWeak; then nothing was made.
        """
        if session_id is not None and (made := await self._recall(tenant, session_id)) is not None:
            return made
        self._vms.refuse_weaker(ask.require_isolation)
        lifetime_s = self._quotas.default_lifetime(tenant, ask.vm_lifetime_seconds)
        self._quotas.admit(tenant, ask.vcpu_count, ask.memory_mb, lifetime_s)
        row = SessionRow(
            id=session_id or new_session_id(),
            tenant_id=tenant.id,
            created_at=datetime.now(UTC),
            closed_at=None,
            lifetime_s=lifetime_s,
            vcpus=ask.vcpu_count,
            memory_mib=ask.memory_mb,
            image="default" if image is None else image,
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
        if ask.egress_policy is not None:
            self.keep_egress(session, ask.egress_policy.egress())
        session.vm = self._vms.spawn(row, ask.env, self.egress(session))
        await self._store.journal.written()
        return session

    async def get(self, tenant: Tenant, session_id: str) -> Session:
        """Raises: SessionNotFound, also for a session of somebody else: it looks the same from outside, and takes as long."""
        session = self._known.get(_canonical(session_id))
        if session is None or session.row.tenant_id != tenant.id:
            session = await self._recall(tenant, _canonical(session_id))
        if session is None:
            raise SessionNotFound(f"there is no session {session_id[:80]}")
        session.tenant = tenant
        return session

    async def of_vm(self, tenant: Tenant, vm_id: str) -> tuple[Session, VmRow]:
        """A sandbox of this tenant, up or long gone, with its session. Raises: NotFound."""
        vm = self._vms.get(vm_id)
        if vm is not None and vm.tenant_id == tenant.id:
            return await self.get(tenant, vm.session_id), vm.row()
        found = await self._rows.by_vm(tenant.id, vm_id)
        if found is None:
            raise NotFound(f"there is no VM {vm_id[:80]}")
        session = await self.get(tenant, found[0].id)
        if found[1].why is EndReason.RESUMED and (latest := session.latest()) is not None:
            return session, latest  # the old id stays good for what it has become
        return session, session.at_rest() or found[1]

    async def all_vms(self, tenant: Tenant, limit: int, status: str | None = None) -> list[tuple[SessionRow, VmRow]]:
        """Every sandbox a tenant ever had, or those with one status, newest first."""
        return await self._rows.vms_of(tenant.id, limit, None if status is None else STATES_OF_WORD[status])

    async def change(
        self,
        tenant: Tenant,
        session: Session,
        metadata: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        lifetime_s: int | None = None,
    ) -> None:
        """Replace the metadata, the lifetime (None = leave it) and set options; recorded when it returns.

        Raises: ForbiddenError: a lifetime over the quota.
        """
        row, vm = session.row, session.vm
        if lifetime_s is not None:
            self._quotas.lifetime(tenant, lifetime_s)
            row = replace(row, lifetime_s=lifetime_s)
            if vm is not None:
                vm.set_lifetime(lifetime_s)
        kept = row.metadata if metadata is None else metadata
        session.row = replace(row, metadata=kept, options={**row.options, **options})
        if vm is not None:
            vm.auto_suspend = bool(session.row.options.get("auto_suspend"))
        ends_at = None if vm is None or lifetime_s is None else vm.row()
        await self._store.journal.written(self._rows.change(session.row, ends_at))

    async def adopt(self, row: SessionRow, vm: VmRow, started: Started) -> None:
        """A sandbox of an earlier server lives on. Its variables are in there; for another one they are lost.

        It reaches again what it did; where that cannot be, nothing.
        """
        kept = await self._store.egress.of([row.id, vm.id])
        session = Session(row, egress=kept.get(row.id))
        egress = kept.get(vm.id, self.egress(session))
        session.vm = self._vms.adopt(row, vm, started)
        self._remember(session)
        if egress.opens:
            try:
                await self._vms.set_egress(session.vm, egress)
            except HostNotReady as exc:
                log.warning("%s was adopted without its network: %s", vm.id, exc)

    def adopted(self, session_id: str) -> Session | None:
        """A session whose sandbox was adopted."""
        session = self._known.get(session_id)
        return session if session is not None and session.vm is not None else None

    def of(self, vm: Vm) -> Session | None:
        """The session of a sandbox that is not gone yet."""
        return self._known.get(vm.session_id)

    def egress(self, session: Session) -> Egress:
        """What its sandbox may reach, or its next one when it has none."""
        if session.vm is not None and session.vm.usable:
            return session.vm.egress
        return self.default_egress if session.egress is None else session.egress

    def keep_egress(self, session: Session, egress: Egress) -> int:
        """What its next sandboxes may reach, and one at rest. Returns: the journal's mark."""
        session.egress, session.resting_egress = egress, None
        if session.vm is not None and session.vm.at_rest:
            session.vm.egress = egress
        if (rest := session.at_rest()) is not None:
            self._store.egress.put(rest.id, egress)
        return self._store.egress.put(session.id, egress)

    async def recall(self, session_id: str) -> Session | None:
        """A session of whatever tenant, for what an earlier server left undone in it."""
        return self._known.get(session_id) or await self._recall(None, session_id)

    async def resting(self, session_id: str) -> Session | None:
        """A session whose sandbox is suspended."""
        session = await self.recall(session_id)
        return session if session is not None and session.at_rest() is not None else None

    def begin(self, session: Session) -> Vm:
        """The session's sandbox, up or coming up; a new one when the last one ended.

        Raises: SessionEnded (killed); QuotaExceededError, NoCapacity.
        """
        self._refuse_closed(session)
        if (rest := session.at_rest()) is not None:
            if not session.row.options.get("auto_resume"):
                raise SessionSuspended(
                    f"the sandbox of session {session.id} is suspended: resume {rest.id}, or set auto_resume"
                )
            return self._respawn(session, rest)
        vm = session.vm
        return self._respawn(session) if vm is None or not vm.usable else vm

    async def ready(self, session: Session) -> Vm:
        """The session's sandbox, ready for code. Starts a new one when the last one ended and nobody killed
        it.

        Raises: SessionEnded (killed); SessionSuspended; BootFailed, NoCapacity, HostNotReady, DiskFull.
        """
        await _rested(session)
        return await self.settled(session, self.begin(session))

    async def reachable(self, session: Session) -> Vm:
        """As `ready`; but one that is still coming up is returned, too, if its node has commands wait for it."""
        await _rested(session)
        vm = self.begin(session)
        return vm if vm.at_node else await self.settled(session, vm)

    async def suspend(self, session: Session) -> tuple[VmRow, Stored | None]:
        """Put the session's sandbox to rest; it goes on under another id when it is resumed. At rest already is fine.

        Raises: SessionEnded, Conflict (there is none), DiskFull, QuotaExceededError, BootFailed; then it runs as before.
        """
        if session.at_rest() is None:
            self._refuse_closed(session)
            vm = session.vm
            if vm is None or not vm.usable:
                raise Conflict(f"session {session.id} has no sandbox that could be suspended")
            await vm.settled.wait()
            if session.tenant is not None:
                self._quotas.store(session.tenant, await self.at_rest_bytes(session.tenant))
            rest = vm.ask_rest()
            await rest.over.wait()
            if rest.error is not None:
                raise rest.error.with_traceback(None)
            await vm.gone.wait()
            await self._store.journal.written()
            return vm.row(), rest.stored
        row = session.latest()
        assert row is not None
        return row, None

    async def resume(self, session: Session, *, wait: bool = True) -> Vm:
        """Bring the session's sandbox back; one that is up is fine.

        Raises: as `ready`; CorruptSnapshot; Conflict (there is none to resume).
        """
        await _rested(session)
        self._refuse_closed(session)
        rest, vm = session.at_rest(), session.vm
        if rest is not None:
            vm = self._respawn(session, rest)
        if vm is None or not vm.usable:
            raise Conflict(f"session {session.id} has no suspended sandbox")
        return await self.settled(session, vm) if wait else vm

    async def fork(self, tenant: Tenant, session: Session, count: int, env: Mapping[str, str]) -> list[Session]:
        """Copies of a sandbox that goes on, memory and disk, each in a session of its own; all of them, or none.

        Raises: as `ready`; QuotaExceededError, NoCapacity.
        """
        parent = await self.ready(session)
        row = session.row
        self._quotas.admit(tenant, row.vcpus, row.memory_mib, row.lifetime_s, count)
        now, both = datetime.now(UTC), {**session.env, **env}
        rows = [
            replace(
                row, id=new_session_id(), created_at=now, closed_at=None, usage=Usage(), env_keys=tuple(sorted(both))
            )
            for _ in range(count)
        ]
        children = [Session(one, both, tenant=tenant) for one in rows]
        for one in children:
            self._rows.add(one.row)
            self._remember(one)
        for one, vm in zip(
            children, self._vms.fork(parent, [(one, both) for one in rows], self.default_egress), strict=True
        ):
            one.vm = vm
        try:
            for one in children:
                assert one.vm is not None
                await self.settled(one, one.vm)
        except BaseException:
            with anyio.CancelScope(shield=True):
                for one in children:
                    await self.kill(one)
            raise
        await self._store.journal.written()
        return children

    async def at_rest_bytes(self, tenant: Tenant) -> int:
        """What a tenant's suspended sandboxes and snapshots take on disk."""
        mine = await self._rows.resting(tenant.id) | await self._store.snapshots.ids(tenant.id)
        return sum(one.own_bytes + one.shared_bytes for name, one in (await self._stored()).items() if name in mine)

    async def settled(self, session: Session, vm: Vm) -> Vm:
        """This sandbox, once it is up. Raises: SessionEnded (killed); why it did not come up."""
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
            if (vm is None or vm.rest is None) and (rest := session.at_rest()) is not None:
                await self._forget(rest.id)
                self._rows.lose_vm(rest, EndReason.KILLED, "killed while it was suspended")
                session.vm, session.past = None, replace(rest, state=State.ENDED, why=EndReason.KILLED)
            session.wake()
        if vm is not None:
            await self._vms.removed(vm)
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
            and not session.vm.at_rest
            and contains(session.row.metadata, wanted)
        )
        return [session for session, _ in zip(mine, range(limit), strict=False)]

    def _respawn(self, session: Session, resumes: VmRow | None = None) -> Vm:
        if session.vm is not None:
            usage = replace(session.row.usage, vm_seconds=session.usage().vm_seconds)
            session.row = replace(session.row, usage=usage)
        row = session.row
        if session.tenant is not None:
            self._quotas.admit(session.tenant, row.vcpus, row.memory_mib, row.lifetime_s)
        egress = self._egress_of_next(session, resumes)
        session.vm = self._vms.spawn(row, session.env, egress, resumes=resumes)
        if resumes is not None:
            self._store.egress.put(session.vm.id, egress)
        self._remember(session)
        session.wake()
        return session.vm

    def _egress_of_next(self, session: Session, resumes: VmRow | None) -> Egress:
        """One that goes on from where it was may reach what it could."""
        if resumes is None or (session.vm is None and session.resting_egress is None):
            return self.egress(session)
        return session.vm.egress if session.vm is not None else session.resting_egress or NOTHING

    async def _recall(self, tenant: Tenant | None, session_id: str) -> Session | None:
        """From the store, if it is this tenant's; None = whoever's it is."""
        found = await self._rows.load(None if tenant is None else tenant.id, session_id)
        if found is None:
            return None
        row, past = found
        kept = await self._store.egress.of([session_id, *([] if past is None else [past.id])])
        session = Session(row, past=past, egress=kept.get(session_id))
        if past is not None:
            session.resting_egress = kept.get(past.id)
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


async def _rested(session: Session) -> None:
    """Wait until a sandbox that is being put to rest is there, or goes on."""
    while session.vm is not None and session.vm.rest is not None:
        await session.vm.rest.over.wait()


def _canonical(session_id: str) -> str:
    """A UUID in the one spelling that is stored; anything else as it came, which no session has."""
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        return session_id
