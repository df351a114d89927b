"""Running commands: wait for the sandbox, send the command, count it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import anyio

from instavm import limits
from instavm.contract.executions import Command, Outcome, OutputSink
from instavm.contract.node import Sandboxes
from instavm.contract.sandboxes import EndReason, Started
from instavm.control.bounds import Bound
from instavm.control.sessions import Session, Sessions
from instavm.control.store.accounts import Tenant
from instavm.control.vms import Vm
from instavm.errors import OutcomeUnknown, SessionEnded
from instavm.wire.executions import Execute
from instavm.wire.sessions import CreateSession

LAST_SECOND_S: Final = 1.0
"""A command without a timeout is stopped this long before the lifetime ends, to save its output."""
ATTEMPTS: Final = 3
"""How often a sandbox may turn out to be gone before a command was sent to it."""


@dataclass(frozen=True, slots=True)
class Ran:
    """An outcome, and where it came from. `start` is there for the first result out of a sandbox."""

    session_id: str
    vm_id: str
    outcome: Outcome
    start: Started | None


class Executions:
    def __init__(self, node: Sandboxes, sessions: Sessions) -> None:
        self._node = node
        self._sessions = sessions
        self._bound = Bound("executions", limits.EXECUTIONS_MAX)

    async def execute(self, tenant: Tenant, ask: Execute, on_output: OutputSink | None = None) -> Ran:
        """As `run`, in the session that is named, or in one made for it.

        Raises: also SessionNotFound; RateLimitError: too many of this account run or wait.
        """
        with self._bound.held(tenant.id):
            if ask.session_id is not None:
                return await self.run(await self._sessions.get(tenant, ask.session_id), ask, on_output)
            session = await self._sessions.create(tenant, CreateSession())
            try:
                return await self.run(session, ask, on_output)
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True):  # only the answer would have told its id
                    await self._sessions.kill(session)
                raise

    async def run(
        self, session: Session, ask: Execute, on_output: OutputSink | None = None, *, task: str | None = None
    ) -> Ran:
        """Run one command to its end. `on_output` sees each piece of output as it arrives.

        task: the sandbox keeps what becomes of it under this name, see `rejoin`.

        It is sent to at most one sandbox: one that is lost before the command went out is replaced, one that
        is lost afterwards is not.
        Raises: SessionEnded, OutcomeUnknown, BootFailed, NoCapacity, HostNotReady, DiskFull.
        """
        for _ in range(ATTEMPTS):
            vm = await self._sessions.reachable(session)
            outcome = await self._run(session, vm, ask, on_output, task)
            if outcome is not None:
                self._sessions.count(session, outcome.execution_time_s, outcome.cpu_time_s)
                return Ran(session.id, vm.id, outcome, _tell_start(vm))
        raise OutcomeUnknown(f"session {session.id} lost its sandbox {ATTEMPTS} times before the code could be sent")

    async def rejoin(self, session: Session, vm: Vm, ask: Execute, task: str) -> Outcome | None:
        """Wait for a task that an earlier server began in this sandbox; it begins now, if it did not.

        Returns: None when the sandbox is gone. Raises: as `run`; ExecutionError: it ran, and is not kept any more.
        """
        return await self._run(session, vm, ask, None, task)

    async def _run(
        self, session: Session, vm: Vm, ask: Execute, on_output: OutputSink | None, task: str | None
    ) -> Outcome | None:
        """Returns: None when the sandbox was gone before the command was sent."""
        turn = {"python": vm.python, "javascript": vm.javascript}.get(ask.language)
        if turn is None:
            return await self._send(session, vm, ask, on_output, task)
        async with turn:
            return await self._send(session, vm, ask, on_output, task)

    async def _send(
        self, session: Session, vm: Vm, ask: Execute, on_output: OutputSink | None, task: str | None
    ) -> Outcome | None:
        if not vm.usable or vm.rest is not None or vm.at_rest:
            return None
        with anyio.CancelScope() as scope:
            vm.running.add(scope)
            try:
                outcome = await self._node.execute(vm.id, _command(vm, ask, task), on_output)
                if not vm.settled.is_set():
                    await vm.settled.wait()  # its node has said before that it is up
                return outcome
            except SessionEnded:
                if vm.settled.is_set():
                    vm.ask_end(EndReason.NODE_LOST, "the node does not know it")
                else:  # it did not come up
                    await self._sessions.settled(session, vm)
                return None
            except OutcomeUnknown as exc:
                raise await _lost(session, vm, str(exc)) from exc
            finally:
                vm.running.discard(scope)
        raise await _lost(session, vm, "it ended")


def _command(vm: Vm, ask: Execute, task: str | None) -> Command:
    return Command(ask.command, ask.language, _timeout_s(vm, ask.timeout), task=task)


def _timeout_s(vm: Vm, asked: float | None) -> float:
    """What was asked; else the default, or what is left of the lifetime when that is less."""
    if asked is not None:
        return asked
    left = vm.remaining_s()
    left = vm.lifetime_s if left is None else left
    return max(limits.EXECUTE_TIMEOUT_S_MIN, min(limits.EXECUTE_TIMEOUT_S_DEFAULT, left - LAST_SECOND_S))


async def _lost(session: Session, vm: Vm, what: str) -> SessionEnded | OutcomeUnknown:
    """Why a command that was sent has no outcome, once it is known how its sandbox ended."""
    if vm.rest is not None:
        await vm.rest.over.wait()
    if vm.at_rest:
        return OutcomeUnknown(
            f"{vm.id} of session {session.id} was suspended while the code ran: it goes on when the sandbox is resumed,"
            " but nobody will be told its outcome"
        )
    vm.ask_end(EndReason.CRASHED, what)
    await vm.gone.wait()
    if session.closed:
        return SessionEnded(f"session {session.id} was killed while the code ran")
    return OutcomeUnknown(
        f"{vm.id} of session {session.id} ended ({vm.lifecycle.why}) while the code ran ({what}):"
        " the code may or may not have finished; its files and variables are gone"
    )


def _tell_start(vm: Vm) -> Started | None:
    """How the sandbox came up, for the first who asks."""
    if vm.start_told:
        return None
    vm.start_told = True
    return vm.started
