"""The services behind the API, built once and handed to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from instavm import limits
from instavm.contract.node import Node
from instavm.contract.sandboxes import EndReason
from instavm.control.accounts import Authenticator, Keys
from instavm.control.adoption import reconcile
from instavm.control.bounds import Bound
from instavm.control.egress import Egresses
from instavm.control.executions import Executions
from instavm.control.files import Files
from instavm.control.processes import Processes
from instavm.control.quotas import Policy, Quotas
from instavm.control.repeats import Repeats
from instavm.control.sessions import Sessions
from instavm.control.snapshots import Snapshots
from instavm.control.store.database import Store
from instavm.control.streams import Streams
from instavm.control.tasks import Tasks
from instavm.control.vms import Vms


@dataclass(frozen=True, slots=True)
class Control:
    node: Node
    accounts: Authenticator
    keys: Keys
    vms: Vms
    sessions: Sessions
    executions: Executions
    streams: Streams
    tasks: Tasks
    files: Files
    processes: Processes
    egress: Egresses
    repeats: Repeats
    snapshots: Snapshots
    requests: Bound
    """Of accounts, whatever they ask for: each holds memory and a connection while it waits."""

    async def stop(self) -> None:
        """End every sandbox, take no new one, and return when nothing is left. Twice is fine."""
        await self.snapshots.end_all()
        await self.vms.end_all(EndReason.SERVER_STOPPED)

    async def leave(self) -> None:
        """Take no new sandbox and let go of those that are up: they live on until the next server adopts them."""
        await self.snapshots.end_all()
        await self.node.leave()
        await self.vms.leave_all()


@asynccontextmanager
async def open_control(
    node: Node, store: Store, accounts: Authenticator, policy: Policy | None = None
) -> AsyncIterator[Control]:
    """The owner of every sandbox's task: leaving it ends all of them that were not left, and waits.

    What an earlier server left is adopted or ended before this returns.
    """
    async with anyio.create_task_group() as tasks:
        vms = Vms(node, store, tasks)
        policy = policy or Policy()
        quotas = Quotas(policy, vms, node.memory)
        sessions = Sessions(store, vms, quotas, node, policy.egress)
        executions = Executions(node, sessions)
        egress = Egresses(store, sessions, vms)
        control = Control(
            node=node,
            accounts=accounts,
            keys=Keys(store.accounts),
            vms=vms,
            sessions=sessions,
            executions=executions,
            streams=Streams(executions, tasks),
            tasks=Tasks(store, sessions, executions, tasks),
            files=Files(node, sessions),
            processes=Processes(node, sessions),
            egress=egress,
            repeats=Repeats(store.repeats),
            snapshots=Snapshots(node, store, sessions, egress, quotas, tasks),
            requests=Bound("requests", limits.REQUESTS_MAX),
        )
        vms.before_end = control.snapshots.keep_last
        await reconcile(node, store, sessions)
        await control.snapshots.give_up()
        await control.tasks.take_up()
        try:
            yield control
        finally:
            with anyio.CancelScope(shield=True):
                await control.stop()
