"""Egress policies, of sessions and of single sandboxes; and where sandboxes that have ended went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, astuple, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select

from instavm.contract.egress import Egress, EgressLog, Seen
from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal, Write
from instavm.control.store.schema import egress, egress_logs

PUT = insert(egress).prefix_with("OR REPLACE")
KEEP_LOG = insert(egress_logs).prefix_with("OR REPLACE")


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

    def keep_log(self, vm_id: str, log: EgressLog) -> None:
        """As it was when the sandbox ended. One that tells nothing takes no place."""
        if log.seen:
            self._journal.append(Write(KEEP_LOG, {"vm_id": vm_id, "log": astuple(replace(log, open_connections=0))}))

    async def log_of(self, vm_id: str) -> EgressLog:
        await self._journal.written()
        ask = select(egress_logs.c.log).where(egress_logs.c.vm_id == vm_id)
        kept = await self._engine.run(lambda connection: connection.execute(ask).scalar_one_or_none())
        if kept is None:
            return EgressLog()
        seen, sent, received, _ = kept
        return EgressLog(tuple(Seen(*one) for one in seen), sent, received)


def _policy(kept: dict[str, Any]) -> Egress:
    return Egress(
        kept["packages"], kept["http"], kept["https"], domains=tuple(kept["domains"]), cidrs=tuple(kept["cidrs"])
    )
