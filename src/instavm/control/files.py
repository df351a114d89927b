"""Files of a session: straight through to its sandbox, and out of it, never held here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from instavm.control.node import Node
from instavm.control.sessions import Sessions
from instavm.control.store.accounts import Tenant
from instavm.sandbox import StoredFile


class Files:
    def __init__(self, node: Node, sessions: Sessions) -> None:
        self._node = node
        self._sessions = sessions

    async def put(
        self, tenant: Tenant, session_id: str, path: str, name: str, chunks: AsyncIterator[bytes]
    ) -> StoredFile:
        """As `Node.put_file`. Raises: also SessionNotFound, and what a boot can end with."""
        vm = await self._sessions.ready(await self._sessions.get(tenant, session_id))
        return await self._node.put_file(vm.id, path, name, chunks)

    async def get(self, tenant: Tenant, session_id: str, path: str) -> AsyncGenerator[bytes, None]:
        """As `Node.get_file`; not read yet. Raises: SessionNotFound, and what a boot can end with."""
        vm = await self._sessions.ready(await self._sessions.get(tenant, session_id))
        return self._node.get_file(vm.id, path)
