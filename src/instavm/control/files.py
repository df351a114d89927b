"""Files of a session: straight through to its sandbox, and out of it, never held here."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from instavm import limits
from instavm.contract import node as contract
from instavm.contract.files import StoredFile
from instavm.control.bounds import Bound
from instavm.control.sessions import Sessions
from instavm.control.store.accounts import Tenant


class Files:
    def __init__(self, node: contract.Files, sessions: Sessions) -> None:
        self._node = node
        self._sessions = sessions
        self._bound = Bound("file transfers", limits.TRANSFERS_MAX)

    async def put(
        self, tenant: Tenant, session_id: str, path: str, name: str, chunks: AsyncIterator[bytes]
    ) -> StoredFile:
        """As `Node.put_file`. Raises: also SessionNotFound, RateLimitError (too many at once), and what a boot can end with."""
        with self._bound.held(tenant.id):
            vm = await self._sessions.ready(await self._sessions.get(tenant, session_id))
            return await self._node.put_file(vm.id, path, name, chunks)

    async def get(self, tenant: Tenant, session_id: str, path: str) -> AsyncGenerator[bytes, None]:
        """As `Node.get_file`; not read yet. Raises: SessionNotFound, and what a boot can end with; once read, as `put`."""
        vm = await self._sessions.ready(await self._sessions.get(tenant, session_id))
        return self._bounded(tenant, self._node.get_file(vm.id, path))

    async def _bounded(self, tenant: Tenant, pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        with self._bound.held(tenant.id):
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
