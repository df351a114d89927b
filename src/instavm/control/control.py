"""The services behind the API, built once and handed to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio

from instavm.control.accounts import Authenticator
from instavm.control.executions import Executions
from instavm.control.node import Node
from instavm.control.sessions import Sessions
from instavm.control.store.database import Store
from instavm.control.vms import Vms
from instavm.sandbox import EndReason


@dataclass(frozen=True, slots=True)
class Control:
    accounts: Authenticator
    vms: Vms
    sessions: Sessions
    executions: Executions

    async def stop(self) -> None:
        """End every sandbox, take no new one, and return when nothing is left. Twice is fine."""
        await self.vms.end_all(EndReason.SERVER_STOPPED)


@asynccontextmanager
async def open_control(node: Node, store: Store, accounts: Authenticator) -> AsyncIterator[Control]:
    """The owner of every sandbox's task: leaving it ends all of them and waits."""
    async with anyio.create_task_group() as tasks:
        vms = Vms(node, store.sessions, tasks)
        sessions = Sessions(store, vms)
        control = Control(accounts, vms, sessions, Executions(node, sessions))
        try:
            yield control
        finally:
            with anyio.CancelScope(shield=True):
                await control.stop()
