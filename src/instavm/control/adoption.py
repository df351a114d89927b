"""After a restart: bring the records and what really lives on the node together, before anybody is answered."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

from instavm.contract.node import Node
from instavm.contract.sandboxes import EndReason
from instavm.control.causes import CONSOLE_KEPT
from instavm.control.lifecycle import State
from instavm.control.sessions import Sessions
from instavm.control.store.database import Store
from instavm.control.store.sessions import SessionRow, VmRow

log = logging.getLogger(__name__)


async def reconcile(node: Node, store: Store, sessions: Sessions) -> None:
    """Every sandbox of the records that lives on is adopted, all others are ended, and so are those of no record.

    What is left of a lifetime goes by the wall clock: between two servers there is no other.
    """
    await store.sessions.forget_consoles(datetime.now(UTC) - CONSOLE_KEPT)
    alive = dict(await node.adopted())
    stored = dict(await node.stored())
    resting: list[VmRow] = []
    adopted: set[str] = set()
    for session, vm in await store.sessions.unended():
        started = alive.pop(vm.id, None)
        if started is None and vm.state in (State.SUSPENDED, State.SUSPENDING) and vm.id in stored:
            resting.append(vm)
        elif started is None:
            store.sessions.lose_vm(vm, EndReason.NODE_LOST, "it did not outlive the server")
        elif (over := _over(session, vm)) is not None:
            await node.stop(vm.id)
            store.sessions.lose_vm(vm, over, "ended when the server came back")
        else:
            await sessions.adopt(session, vm, started)
            adopted.add(session.id)
            log.info("%s of session %s is adopted", vm.id, session.id)
    for vm_id in alive:
        log.warning("%s is in no record: ending it", vm_id)
        await node.stop(vm_id)
    for vm in resting:
        if vm.session_id in adopted:  # it was being resumed, and that went well
            store.sessions.lose_vm(vm, EndReason.RESUMED, "it goes on under another id")
            continue
        del stored[vm.id]
        if vm.state is State.SUSPENDING:
            store.sessions.at_rest(vm)
    for name in stored.keys() - await store.snapshots.ids():
        await node.forget(name)  # being made when the server was killed, or resumed and not yet removed
    await store.journal.written()


def _over(session: SessionRow, vm: VmRow) -> EndReason | None:
    """Why a sandbox must not go on, if so."""
    if vm.state is State.ENDING:
        return vm.why or EndReason.NODE_LOST
    if vm.state is State.SUSPENDED:  # it was resumed, and is still here: nobody saw it through
        return EndReason.NODE_LOST
    if session.closed_at is not None:
        return EndReason.KILLED
    expires_at = vm.expires_at or vm.created_at + timedelta(seconds=session.lifetime_s)
    return EndReason.LIFETIME if expires_at <= datetime.now(UTC) else None
