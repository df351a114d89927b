"""Egress policies, of sessions and of single sandboxes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select

from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal, Write
from instavm.control.store.schema import egress
from instavm.sandbox import Egress

PUT = insert(egress).prefix_with("OR REPLACE")


class EgressRows:
    def __init__(self, engine: Engine, journal: Journal) -> None:
        self._engine = engine
        self._journal = journal

    def put(self, target: str, policy: Egress) -> int:
        """target: the id of a session or of a sandbox. Returns: the journal's mark."""
        values = {"target": target, "policy": asdict(policy), "changed_at": datetime.now(UTC)}
        return self._journal.append(Write(PUT, values))

    async def of(self, targets: Iterable[str]) -> dict[str, Egress]:
        """Those that were set, by id."""
        await self._journal.written()
        ask = select(egress.c.target, egress.c.policy).where(egress.c.target.in_(list(targets)))
        rows = await self._engine.run(lambda connection: connection.execute(ask).all())
        return {row.target: _policy(row.policy) for row in rows}


def _policy(kept: dict[str, Any]) -> Egress:
    return Egress(
        kept["packages"], kept["http"], kept["https"], domains=tuple(kept["domains"]), cidrs=tuple(kept["cidrs"])
    )
