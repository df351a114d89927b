"""Sandboxes that are up, coming up or going down: one task each, from boot until nothing is left.

Times that decide something are the event loop's monotonic clock; the wall clock is only for showing.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final

import anyio
from anyio.abc import TaskGroup

from instavm.contract.egress import NOTHING, Egress, EgressDecision, EgressLog
from instavm.contract.isolation import Isolation, Tier
from instavm.contract.node import Node
from instavm.contract.sandboxes import Ended, EndReason, SandboxSpec, Started
from instavm.control.copies import Birth, Copies, Rest
from instavm.control.ids import new_vm_id
from instavm.control.lifecycle import Lifecycle, State
from instavm.control.store.database import Store
from instavm.control.store.sessions import SessionRow, VmRow
from instavm.errors import BootFailed, InstaVMError, IsolationTooWeak, OutcomeUnknown, ServerStopping, SessionEnded

log = logging.getLogger(__name__)

ON_PURPOSE: Final = (EndReason.KILLED, EndReason.LIFETIME, EndReason.SERVER_STOPPED)
"""Ends of sandboxes that are well until then."""
RESPONDS_S: Final = 0.08
"""How long a kill waits for a sign of life from the node before it is answered without it."""
LOOK_AGAIN_S: Final = 1.0
"""Pause until a kill that still waits looks for the next sign of life."""
STOP_S: Final = 30.0
"""How long a node may take to remove a sandbox before control gives up waiting and says so."""


@dataclass(slots=True, eq=False)
class Vm:
    """One sandbox. Only `Vms` changes it; others wait for `settled` (usable, or never will be) and `gone`."""

    spec: SandboxSpec
    session_id: str
    tenant_id: str
    lifetime_s: float
    created_at: datetime
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    started: Started | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None
    up_since: float | None = None
    """Monotonic seconds."""
    up_until: float | None = None
    error: InstaVMError | None = None
    """Why the boot failed."""
    resumes: VmRow | None = None
    """The sandbox at rest that it goes on from."""
    birth: Birth | None = None
    """How it comes up, if it is not simply started."""
    auto_suspend: bool = False
    """What the end of its lifetime means: rest."""
    rest: Rest | None = None
    """It is being put to rest, or is."""
    settled: anyio.Event = field(default_factory=anyio.Event)
    gone: anyio.Event = field(default_factory=anyio.Event)
    python: anyio.Lock = field(default_factory=partial(anyio.Lock, fast_acquire=True))
    """One interpreter, so one Python command at a time; the others wait their turn."""
    javascript: anyio.Lock = field(default_factory=partial(anyio.Lock, fast_acquire=True))
    """The same for JavaScript."""
    egress: Egress = NOTHING
    """What it may reach now."""
    egress_change: anyio.Lock = field(default_factory=anyio.Lock)
    running: set[anyio.CancelScope] = field(default_factory=set)
    """Commands in flight; cancelled when the sandbox is gone and the node has not ended them itself."""
    at_node: bool = False
    """The node knows of it, so that commands may be sent: it has them wait for a sandbox that is coming up."""
    start_told: bool = False
    boot: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    life: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    lifetime: anyio.CancelScope | None = None
    """Ends when its lifetime does; None until it is ready."""
    asked: anyio.Event = field(default_factory=anyio.Event)
    killed: anyio.Event = field(default_factory=anyio.Event)
    """Set when its end was asked for by its user: a suspend that is under way is not waited for."""
    asked_why: EndReason | None = None
    asked_detail: str | None = None
    console: str | None = None
    """What its console said last, if it did not end on purpose."""
    asked_rest: bool = False

    @property
    def id(self) -> str:
        return self.spec.vm_id

    @property
    def usable(self) -> bool:
        """True while commands may be sent to it, now or soon: it is not ending, and nobody asked it to."""
        return self.lifecycle.why is None and self.asked_why is None

    @property
    def at_rest(self) -> bool:
        return self.lifecycle.state is State.SUSPENDED

    def ask_rest(self) -> Rest:
        """Have it put to rest. Several who ask wait for the same."""
        if self.rest is None:
            self.rest, self.asked_rest = Rest(), True
            self.asked.set()
        return self.rest

    def ask_end(self, why: EndReason, detail: str | None = None) -> None:
        """Have it ended. The first one to ask gives the reason."""
        if self.usable:
            self.asked_why, self.asked_detail = why, detail
            if why is EndReason.KILLED:
                self.killed.set()
            self.boot.cancel()
            self.asked.set()

    def set_lifetime(self, lifetime_s: float) -> None:
        """Counted, like the one before, from when it was ready: one that is over already ends it."""
        self.lifetime_s = lifetime_s
        if self.lifetime is not None:
            self.lifetime.deadline = anyio.current_time() + (self.remaining_s() or 0.0)

    def uptime_s(self) -> float:
        """Seconds since it was ready; once it ended, how long it was up."""
        if self.up_since is None:
            return 0.0
        return (time.monotonic() if self.up_until is None else self.up_until) - self.up_since

    def remaining_s(self) -> float | None:
        """Seconds until the lifetime runs out; None until it is ready, 0 when it ended."""
        if self.lifecycle.why is not None:
            return 0.0
        return None if self.up_since is None else max(0.0, self.lifetime_s - self.uptime_s())

    def row(self) -> VmRow:
        expires_at = None if self.started_at is None else self.started_at + timedelta(seconds=self.lifetime_s)
        return VmRow(
            id=self.id,
            session_id=self.session_id,
            state=self.lifecycle.state,
            why=self.lifecycle.why,
            created_at=self.created_at,
            started_at=self.started_at,
            expires_at=expires_at,
            ended_at=self.ended_at,
            start=self.started,
            detail=self.asked_detail,
            console=self.console,
        )


class Vms:
    """Starts and ends sandboxes on the node and records every step. Owns one task per sandbox."""

    def __init__(self, node: Node, store: Store, tasks: TaskGroup) -> None:
        self._node = node
        self._rows = store.sessions
        self._logs = store.egress
        self._tasks = tasks
        self._live: dict[str, Vm] = {}
        self._stopping = False
        self._leaving = False
        self.before_end: Callable[[Vm], Awaitable[None]] | None = None
        """What is to be done with a sandbox that is up and about to be ended."""
        node.on_end(self._ended)

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> Iterable[Vm]:
        """Every sandbox of which something is still there."""
        return self._live.values()

    def get(self, vm_id: str) -> Vm | None:
        return self._live.get(vm_id)

    async def stage_env(self, vm: Vm, env: Mapping[str, str]) -> None:
        """Variables for everything that starts in it from now on. Values go to the guest and stay nowhere else."""
        await self._node.stage_env(vm.id, env)

    async def set_egress(self, vm: Vm, egress: Egress) -> bool:
        """Once it is up, have it reach that and nothing else. Returns: False when it has ended. Raises: HostNotReady."""
        await vm.settled.wait()
        async with vm.egress_change:
            if not vm.usable:
                return False
            try:
                await self._node.set_egress(vm.id, egress)
            except SessionEnded:
                return False
            vm.egress = egress
        return True

    async def check_egress(self, vm: Vm, host: str, port: int, protocol: str, egress: Egress | None) -> EgressDecision:
        """Once it is up. Raises: SessionEnded, HostNotReady."""
        await vm.settled.wait()
        return await self._node.check_egress(vm.id, host, port, protocol, egress)

    async def check_policy(self, egress: Egress, host: str, port: int, protocol: str) -> EgressDecision:
        """The same for a sandbox that is yet to come. Raises: HostNotReady."""
        return await self._node.check_egress(None, host, port, protocol, egress)

    async def egress_log(self, vm: Vm) -> EgressLog:
        """Raises: SessionEnded."""
        await vm.settled.wait()
        return await self._node.egress_log(vm.id)

    def refuse_weaker(self, wanted: Tier | None) -> None:
        """Raises: IsolationTooWeak, when this host confines its sandboxes less than that."""
        if not self._node.tier.satisfies(wanted):
            raise IsolationTooWeak(
                f"require_isolation: {wanted} asked for, sandboxes of this host are {self._node.tier}"
            )

    async def isolation(self, vm: Vm) -> Isolation:
        return await self._node.isolation(vm.id)

    def next_end_s(self) -> float | None:
        """Seconds until the first lifetime runs out, if any sandbox is up; nobody knows who is killed before."""
        return min((left for vm in self._live.values() if (left := vm.remaining_s()) is not None), default=None)

    def adopt(self, session: SessionRow, row: VmRow, started: Started) -> Vm:
        """Take over a sandbox that an earlier server started. Across servers only the wall clock goes on."""
        spec = SandboxSpec(row.id, session.vcpus, session.memory_mib, session.image)
        vm = Vm(spec, session.id, session.tenant_id, session.lifetime_s, row.created_at)
        vm.auto_suspend = bool(session.options.get("auto_suspend"))
        vm.started, vm.started_at = started, row.started_at or row.created_at
        vm.up_since = time.monotonic() - max(0.0, (datetime.now(UTC) - vm.started_at).total_seconds())
        vm.start_told = True
        self._live[vm.id] = vm
        if row.state is State.CREATING:  # the last server was killed before it could write that it is up
            self._move(vm, State.ACTIVE)
        else:
            vm.lifecycle = Lifecycle(row.state)
            if row.state is State.SUSPENDING:
                self._move(vm, State.ACTIVE)
        vm.settled.set()
        self._tasks.start_soon(self._life, vm, name=vm.id)
        return vm

    def spawn(
        self,
        session: SessionRow,
        env: Mapping[str, str],
        egress: Egress = NOTHING,
        *,
        resumes: VmRow | None = None,
        birth: Birth | None = None,
    ) -> Vm:
        """Begin to boot a sandbox and return at once. Raises: ServerStopping.

        resumes: it goes on from that one, which is at rest. birth: how it comes up instead of being started.
        """
        if self._stopping:
            raise ServerStopping("the server is stopping; start it again and repeat the call")
        saved = None if resumes is None else resumes.id
        wanted = session.options.get("require_isolation")
        spec = SandboxSpec(
            new_vm_id(),
            session.vcpus,
            session.memory_mib,
            session.image,
            env,
            egress,
            saved,
            None if wanted is None else Tier(wanted),
        )
        vm = Vm(spec, session.id, session.tenant_id, session.lifetime_s, datetime.now(UTC), egress=egress)
        vm.resumes, vm.birth = resumes, birth
        vm.auto_suspend = bool(session.options.get("auto_suspend"))
        self._live[vm.id] = vm
        self._rows.add_vm(vm.row())
        self._tasks.start_soon(self._life, vm, name=vm.id)
        return vm

    def fork(self, parent: Vm, sessions: Sequence[tuple[SessionRow, Mapping[str, str]]], egress: Egress) -> list[Vm]:
        """Begin to copy a sandbox that is up, once for each session, and return at once. Raises: as `spawn`."""
        copies = Copies(self._node, parent.id)
        children = [self.spawn(session, env, egress, birth=copies.born) for session, env in sessions]
        self._tasks.start_soon(copies.make, [child.spec for child in children], name=f"copies of {parent.id}")
        return children

    async def removed(self, vm: Vm) -> None:
        """Wait until nothing is left of a sandbox whose end was asked for.

        When the node does not answer, return before that: the sandbox stays `ending` until the node goes on.
        """
        while not vm.gone.is_set():
            if not await self._node.responds(RESPONDS_S):
                log.warning("%s ends as soon as the node answers again", vm.id)
                return
            with anyio.move_on_after(LOOK_AGAIN_S):
                await vm.gone.wait()

    async def end_all(self, why: EndReason) -> None:
        """End every sandbox, accept no new one, and wait until nothing is left."""
        self._stopping = True
        for vm in list(self._live.values()):
            vm.ask_end(why)
        for vm in list(self._live.values()):
            await vm.gone.wait()

    async def leave_all(self) -> None:
        """Let go of every sandbox that is up, for the next server to adopt; end those that are coming up or going down."""
        self._stopping = self._leaving = True
        for vm in list(self._live.values()):
            if vm.lifecycle.state is State.ACTIVE and vm.usable and vm.rest is None:
                vm.life.cancel()
            else:
                vm.ask_end(EndReason.SERVER_STOPPED)
        for vm in list(self._live.values()):
            await vm.gone.wait()

    def _ended(self, ended: Ended) -> None:
        vm = self._live.get(ended.vm_id)
        if vm is not None:
            vm.console = ended.console or None
            vm.ask_end(ended.reason, ended.detail)

    async def _life(self, vm: Vm) -> None:
        try:
            with vm.life:
                if vm.started is not None or await self._boot(vm):
                    if vm.resumes is not None:
                        await self._replace(vm, vm.resumes)
                    while vm.asked_why is None and vm.lifecycle.state is State.ACTIVE:
                        await self._until_asked(vm)
                    if (
                        self.before_end is not None
                        and vm.asked_why in ON_PURPOSE
                        and vm.lifecycle.state is State.ACTIVE
                    ):
                        await self.before_end(vm)
                if vm.lifecycle.state is State.SUSPENDED and vm.asked_why is EndReason.KILLED:
                    await self._node.forget(vm.id)
                if vm.lifecycle.state is not State.SUSPENDED or vm.asked_why is EndReason.KILLED:
                    self._move(vm, State.ENDING, vm.asked_why, vm.asked_detail)
        except Exception:
            log.exception("the task of %s failed", vm.id)
        finally:
            with anyio.CancelScope(shield=True):
                if vm.lifecycle.state is State.SUSPENDED or (vm.life.cancelled_caught and self._leaving):
                    self._let_go(vm)
                else:
                    await self._remove(vm)

    async def _until_asked(self, vm: Vm) -> None:
        """Until somebody asks for its end or its rest, or its lifetime does. Put to rest it may be when this returns."""
        with anyio.move_on_after(vm.remaining_s()) as lifetime:
            vm.lifetime = lifetime
            await vm.asked.wait()
        if lifetime.cancelled_caught and vm.auto_suspend and vm.rest is None:
            vm.ask_rest()
        if vm.asked_why is None and vm.rest is not None:
            await self._put_to_rest(vm, vm.rest)
        if lifetime.cancelled_caught and vm.lifecycle.state is State.ACTIVE:
            vm.ask_end(EndReason.LIFETIME)

    async def _put_to_rest(self, vm: Vm, rest: Rest) -> None:
        self._move(vm, State.SUSPENDING)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._stop_when_killed, vm)
            await self._suspend(vm, rest)
            tasks.cancel_scope.cancel()
        vm.rest, vm.asked_rest = None, False
        if rest.error is None:
            await self._keep_egress_log(vm)
            vm.up_until = time.monotonic()
            self._move(vm, State.SUSPENDED)
        else:
            log.warning("%s could not be put to rest: %s", vm.id, rest.error)
            if vm.asked_why is None:
                vm.asked = anyio.Event()
                self._move(vm, State.ACTIVE)
        rest.over.set()

    async def _stop_when_killed(self, vm: Vm) -> None:
        """A VMM that does not answer holds up a suspend, but not the kill that comes meanwhile."""
        await vm.killed.wait()
        with contextlib.suppress(InstaVMError):  # the removal of the sandbox asks for the same again, and reports it
            await self._node.stop(vm.id)

    async def _suspend(self, vm: Vm, rest: Rest) -> None:
        try:
            rest.stored = await self._node.suspend(vm.id)
        except (SessionEnded, OutcomeUnknown) as exc:
            rest.error = exc
            vm.ask_end(EndReason.CRASHED, str(exc))
        except InstaVMError as exc:
            rest.error = exc
        except Exception:
            log.exception("putting %s to rest failed in a way that the node does not know", vm.id)
            rest.error = BootFailed(f"{vm.id} could not be put to rest: internal error")

    async def _replace(self, vm: Vm, was: VmRow) -> None:
        """It goes on from one that was at rest: that one is over, and what was stored of it goes."""
        self._rows.lose_vm(was, EndReason.RESUMED, f"it goes on as {vm.id}")
        await self._node.forget(was.id)

    def _let_go(self, vm: Vm) -> None:
        """It lives on, without us; or rests."""
        del self._live[vm.id]
        vm.gone.set()
        for scope in vm.running:
            scope.cancel()

    async def _boot(self, vm: Vm) -> bool:
        """Returns: whether it is active now; if not, somebody asked for its end or the boot itself did."""
        with vm.boot:
            vm.at_node = vm.birth is None and vm.resumes is None
            try:
                vm.started = await (vm.birth or self._node.start)(vm.spec)
            except InstaVMError as exc:
                vm.error = exc
            except Exception:
                log.exception("starting %s failed in a way that the node does not know", vm.id)
                vm.error = BootFailed(f"{vm.id} could not be started: internal error")
        if isinstance(vm.error, BootFailed):
            vm.console = vm.error.console or None
        if vm.error is not None:
            vm.ask_end(EndReason.BOOT_FAILED, str(vm.error))
        if not vm.usable:
            return False
        vm.up_since, vm.started_at = time.monotonic(), datetime.now(UTC)
        self._move(vm, State.ACTIVE)
        vm.settled.set()
        return True

    async def _remove(self, vm: Vm) -> None:
        if vm.up_since is not None:
            vm.up_until = time.monotonic()
        vm.settled.set()
        try:
            with anyio.fail_after(STOP_S):
                await self._node.stop(vm.id)
                await self._keep_egress_log(vm)
        except Exception:
            log.exception("%s could not be removed cleanly", vm.id)
        finally:
            if vm.lifecycle.state is not State.ENDING:
                self._move(vm, State.ENDING, EndReason.SERVER_STOPPED)
            vm.ended_at = datetime.now(UTC)
            self._move(vm, State.ENDED)
            del self._live[vm.id]
            vm.gone.set()
            for scope in vm.running:
                scope.cancel()

    async def _keep_egress_log(self, vm: Vm) -> None:
        """Of one that has ended: its node gives it out once more."""
        with contextlib.suppress(SessionEnded):  # it never had a network
            self._logs.keep_log(vm.id, await self._node.egress_log(vm.id))

    def _move(self, vm: Vm, new: State, why: EndReason | None = None, detail: str | None = None) -> None:
        was = vm.lifecycle.state
        vm.lifecycle.to(new, why)
        log.info("%s %s -> %s%s", vm.id, was, new, f" ({why})" if why else "")
        self._rows.move_vm(vm.row(), was, datetime.now(UTC), detail, vm.uptime_s())
