"""What was answered to requests that came with an Idempotency-Key."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import bindparam, delete, insert, select, update

from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal, Write
from instavm.control.store.schema import repeats

KEPT: Final = timedelta(hours=24)

ADD = insert(repeats)
ANSWER = (
    update(repeats)
    .where(repeats.c.tenant_id == bindparam("tenant"), repeats.c.key == bindparam("name"))
    .values(answer=bindparam("said"))
)
FORGET = delete(repeats).where(repeats.c.tenant_id == bindparam("tenant"), repeats.c.key == bindparam("name"))


@dataclass(frozen=True, slots=True)
class RepeatRow:
    """`fingerprint`: SHA-256 of the request. `target`: the id that was set aside for what it makes.

    `answer`: JSON, or None while it is under way, or when the server ended before it was answered.
    """

    tenant_id: str
    key: str
    fingerprint: str
    target: str
    answer: bytes | None = None


class RepeatRows:
    def __init__(self, engine: Engine, journal: Journal) -> None:
        self._engine = engine
        self._journal = journal

    async def load(self, tenant_id: str, key: str) -> RepeatRow | None:
        await self._journal.written()
        ask = select(repeats).where(
            repeats.c.tenant_id == tenant_id, repeats.c.key == key, repeats.c.created_at > datetime.now(UTC) - KEPT
        )
        row = await self._engine.run(lambda connection: connection.execute(ask).one_or_none())
        return None if row is None else RepeatRow(row.tenant_id, row.key, row.fingerprint, row.target, row.answer)

    async def add(self, row: RepeatRow) -> None:
        """Durable when it returns; what is too old to count is forgotten on the way."""
        now = datetime.now(UTC)
        old = delete(repeats).where(repeats.c.created_at <= now - KEPT)
        await self._engine.run(lambda connection: connection.execute(old))
        values = {"tenant_id": row.tenant_id, "key": row.key, "fingerprint": row.fingerprint}
        mark = self._journal.append(Write(ADD, {**values, "created_at": now, "target": row.target}))
        await self._journal.written(mark)

    async def answered(self, row: RepeatRow, answer: bytes) -> None:
        """Durable when it returns."""
        mark = self._journal.append(Write(ANSWER, {"tenant": row.tenant_id, "name": row.key, "said": answer}))
        await self._journal.written(mark)

    def forget(self, row: RepeatRow) -> None:
        """It was refused and made nothing: the key is free again."""
        self._journal.append(Write(FORGET, {"tenant": row.tenant_id, "name": row.key}))
