"""What sandboxes may reach: set for a session (its sandbox, and those that follow) or for one sandbox, at any time.

The last one to be set holds for a sandbox. What is answered is in force: it is recorded after the node has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from instavm.contract.egress import Egress, EgressDecision, EgressLog
from instavm.control.sessions import Session, Sessions
from instavm.control.store.database import Store
from instavm.control.store.sessions import VmRow
from instavm.control.vms import Vm, Vms
from instavm.errors import SessionEnded, SessionError

BUILT_IN: Final = {
    "private": "special_address",
    "host": "special_address",
    "control_plane": "control_plane",
    "no_ipv6": "network",
    "bad_name": "network",
    "unresolved": "upstream",
    "unreachable": "upstream",
}
"""Rules that no policy sets, and where they come from. All others come from a policy."""


@dataclass(frozen=True, slots=True)
class Checked:
    """source: `session`, `vm`, `default` or `given` (a policy), `operator`, or of BUILT_IN.

    vm_id: the sandbox that it was decided for; None: it has none yet. `applied`: whether that is in force.
    """

    decision: EgressDecision
    source: str
    vm_id: str | None
    applied: bool


class Egresses:
    def __init__(self, store: Store, sessions: Sessions, vms: Vms) -> None:
        self._store = store
        self._sessions = sessions
        self._vms = vms

    async def set_session(self, session: Session, egress: Egress) -> bool:
        """Returns: whether it is in force; False: it waits for a sandbox. Raises: SessionEnded (killed), HostNotReady."""
        if session.closed:
            raise SessionEnded(f"session {session.id} was killed; make a new one")
        vm = session.vm
        applied = vm is not None and vm.usable and await self._vms.set_egress(vm, egress)
        if applied and vm is not None:
            self._store.egress.put(vm.id, egress)
        await self._store.journal.written(self._sessions.keep_egress(session, egress))
        return applied

    async def set_vm(self, session: Session, vm_id: str, egress: Egress) -> None:
        """Raises: SessionEnded, HostNotReady."""
        if not await self._vms.set_egress(self._live(session, vm_id), egress):
            raise SessionEnded(f"VM {vm_id} has ended")
        await self._store.journal.written(self._store.egress.put(vm_id, egress))

    def of_session(self, session: Session) -> tuple[Egress, bool]:
        """What is in force, or will be for its next sandbox, and whether it is."""
        vm = session.vm
        up = vm is not None and vm.usable and vm.started is not None
        return self._sessions.egress(session), up

    def of_vm(self, session: Session, vm_id: str) -> tuple[Egress, bool]:
        """Raises: SessionEnded."""
        vm = self._live(session, vm_id)
        return vm.egress, vm.started is not None

    async def of_vms(self, rows: Sequence[VmRow]) -> dict[str, tuple[Egress, bool]]:
        """The same of sandboxes that have not ended, by id. One at rest has it when it goes on."""
        known = {row.id: vm for row in rows if (vm := self._vms.get(row.id)) is not None and vm.usable}
        resting = {row.id: row for row in rows if row.why is None and row.id not in known}
        kept = await self._store.egress.of([*resting, *(row.session_id for row in resting.values())]) if resting else {}
        default = self._sessions.default_egress
        return {
            **{vm_id: (vm.egress, vm.started is not None) for vm_id, vm in known.items()},
            **{vm_id: (kept.get(vm_id, kept.get(row.session_id, default)), False) for vm_id, row in resting.items()},
        }

    async def check(
        self, session: Session, host: str, port: int, protocol: str, egress: Egress | None = None
    ) -> Checked:
        """What the filter says about a destination, under what is in force or, given `egress`, would be if that were set.

        Raises: HostNotReady.
        """
        vm = session.vm
        if vm is not None and vm.usable:
            with contextlib.suppress(SessionEnded):  # just now: then as for one that has not begun
                decision = await self._vms.check_egress(vm, host, port, protocol, egress)
                return Checked(decision, self._source(session, decision, egress), vm.id, egress is None)
        policy = self._sessions.egress(session) if egress is None else egress
        decision = await self._vms.check_policy(policy, host, port, protocol)
        return Checked(decision, self._source(session, decision, egress), None, False)

    def _source(self, session: Session, decision: EgressDecision, egress: Egress | None) -> str:
        """Where the rule that decided comes from."""
        if decision.operators:
            return "operator"
        if decision.rule in BUILT_IN:
            return BUILT_IN[decision.rule]
        if egress is not None:
            return "given"
        in_force = self._sessions.egress(session)
        if session.egress is not None and in_force == session.egress:
            return "session"
        return "default" if session.egress is None and in_force == self._sessions.default_egress else "vm"

    async def log(self, session: Session, vm_id: str | None = None) -> tuple[str, EgressLog]:
        """The sandbox that it is about, and its log, also when it has ended. Raises: SessionError (there was none yet)."""
        latest = session.latest()
        if latest is None:
            raise SessionError(f"session {session.id} has had no sandbox yet")
        vm, vm_id = session.vm, vm_id or latest.id
        if vm is not None and vm.usable and vm.id == vm_id:
            with contextlib.suppress(SessionEnded):  # just now: then it is kept
                return vm_id, await self._vms.egress_log(vm)
            await vm.gone.wait()
        return vm_id, await self._store.egress.log_of(vm_id)

    def _live(self, session: Session, vm_id: str) -> Vm:
        vm = session.vm
        if vm is None or vm.id != vm_id or not vm.usable:
            raise SessionEnded(f"VM {vm_id[:80]} has ended")
        return vm
