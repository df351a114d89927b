"""What sandboxes may reach: set for a session (its sandbox, and those that follow) or for one sandbox, at any time.

The last one to be set holds for a sandbox. What is answered is in force: it is recorded after the node has it.
"""

from __future__ import annotations

from instavm.control.sessions import Session, Sessions
from instavm.control.store.database import Store
from instavm.control.vms import Vm, Vms
from instavm.errors import SessionEnded, SessionError
from instavm.sandbox import Egress, EgressLog


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

    async def log(self, session: Session, vm_id: str | None = None) -> tuple[str, EgressLog]:
        """The sandbox that it is about, and the log, which lives as long as that. Raises: SessionError, SessionEnded."""
        if vm_id is None and (session.vm is None or not session.vm.usable):
            raise SessionError(f"session {session.id} has no sandbox; the log of one goes with it")
        vm = session.vm if vm_id is None else self._live(session, vm_id)
        assert vm is not None, "it was just looked at"
        return vm.id, await self._vms.egress_log(vm)

    def _live(self, session: Session, vm_id: str) -> Vm:
        vm = session.vm
        if vm is None or vm.id != vm_id or not vm.usable:
            raise SessionEnded(f"VM {vm_id[:80]} has ended")
        return vm
