"""After a restart: bring the records and what really lives on the node together, before anybody is answered."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta

from instavm.control.lifecycle import State
from instavm.control.node import Node
from instavm.control.sessions import Sessions
from instavm.control.store.database import Store
from instavm.control.store.sessions import SessionRow, VmRow
from instavm.sandbox import EndReason

log = logging.getLogger(__name__)


async def reconcile(node: Node, store: Store, sessions: Sessions) -> None:
    """Every sandbox of the records that lives on is adopted, all others are ended, and so are those of no record.

    What is left of a lifetime goes by the wall clock: between two servers there is no other.
    """
    alive = dict(await node.adopted())
    for session, vm in await store.sessions.unended():
        started = alive.pop(vm.id, None)
        if started is None:
            store.sessions.lose_vm(vm, EndReason.NODE_LOST, "it did not outlive the server")
        elif (over := _over(session, vm)) is not None:
            await node.stop(vm.id)
            store.sessions.lose_vm(vm, over, "ended when the server came back")
        else:
            await sessions.adopt(session, vm, started)
            log.info("%s of session %s is adopted", vm.id, session.id)
    for vm_id in alive:
        log.warning("%s is in no record: ending it", vm_id)
        await node.stop(vm_id)
    await store.journal.written()


def _over(session: SessionRow, vm: VmRow) -> EndReason | None:
    """Why a sandbox must not go on, if so."""
    if vm.state is State.ENDING:
        return vm.why or EndReason.NODE_LOST
    if session.closed_at is not None:
        return EndReason.KILLED
    expires_at = vm.expires_at or vm.created_at + timedelta(seconds=session.lifetime_s)
    return EndReason.LIFETIME if expires_at <= datetime.now(UTC) else None
