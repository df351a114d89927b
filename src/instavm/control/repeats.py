"""Requests with an Idempotency-Key: done once, however often they are sent, across restarts of the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from instavm.control.ids import new_session_id
from instavm.control.store.accounts import Tenant
from instavm.control.store.repeats import RepeatRow, RepeatRows
from instavm.errors import Conflict, InstaVMError, OutcomeUnknown

Work = Callable[[str], Awaitable[bytes]]
"""Is handed the id set aside for the session that it makes, if it makes one."""


class Repeats:
    def __init__(self, rows: RepeatRows) -> None:
        self._rows = rows
        self._under_way: dict[tuple[str, str], anyio.Event] = {}

    async def once(self, tenant: Tenant, key: str, fingerprint: str, work: Work, *, again: bool) -> bytes:
        """The answer to the first request with this key; those that come meanwhile wait for it.

        again: whether the work may be begun anew when a server ended in the midst of it. Making a session may: it gets
        the same id and is found when it was made. Running code may not.
        Raises: Conflict (the key came with another request); OutcomeUnknown; whatever `work` raises, which frees the key.
        """
        name = (tenant.id, key)
        while (other := self._under_way.get(name)) is not None:
            await other.wait()
        mine = self._under_way[name] = anyio.Event()
        try:
            return await self._once(RepeatRow(tenant.id, key, fingerprint, new_session_id()), work, again)
        finally:
            del self._under_way[name]
            mine.set()

    async def _once(self, wanted: RepeatRow, work: Work, again: bool) -> bytes:
        row = await self._rows.load(wanted.tenant_id, wanted.key)
        if row is None:
            row = wanted
            await self._rows.add(row)
        elif row.fingerprint != wanted.fingerprint:
            raise Conflict("this Idempotency-Key was used for another request")
        elif row.answer is not None:
            return row.answer
        elif not again:
            raise OutcomeUnknown("a request with this Idempotency-Key was broken off: the code may or may not have run")
        try:
            answer = await work(row.target)
        except OutcomeUnknown:
            raise
        except InstaVMError:
            self._rows.forget(row)
            raise
        await self._rows.answered(row, answer)
        return answer
