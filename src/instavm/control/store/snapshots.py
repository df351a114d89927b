"""Snapshots that users keep: of a sandbox's disk, or built from an OCI image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import BindParameter, Row, bindparam, delete, insert, select, update

from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal, Write
from instavm.control.store.schema import snapshots

UNFINISHED: Final = ("pending", "building", "creating")
KEY: BindParameter[str] = bindparam("key")
ADD = insert(snapshots)
CHANGE = update(snapshots).where(snapshots.c.id == KEY, snapshots.c.status.in_(UNFINISHED))
REMOVE = delete(snapshots).where(snapshots.c.id == KEY)


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """`status`: pending, building (from an image), creating (of a sandbox), ready, failed. `type`: user or system.

    digest: of the image's manifest, as the registry told it when it was built. build_args: as they were asked for,
    without what is secret.
    """

    id: str
    tenant_id: str
    name: str | None
    type: str
    status: str
    created_at: datetime
    vcpus: int
    memory_mib: int
    vm_id: str | None = None
    oci_image: str | None = None
    digest: str | None = None
    size_bytes: int = 0
    build_args: Mapping[str, Any] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    log: str = ""
    last_error: str | None = None
    finished_at: datetime | None = None


class SnapshotRows:
    def __init__(self, engine: Engine, journal: Journal) -> None:
        self._engine = engine
        self._journal = journal

    def add(self, row: SnapshotRow) -> int:
        """Returns: the journal's mark."""
        return self._journal.append(Write(ADD, _values(row)))

    def change(self, row: SnapshotRow) -> int:
        """Compare and set: one that is ready, failed or removed stays so. Returns: the journal's mark."""
        values = _values(row)
        return self._journal.append(
            Write(CHANGE, {"key": values.pop("id"), **values}, f"snapshot {row.id} is being made")
        )

    def remove(self, snapshot_id: str) -> int:
        return self._journal.append(Write(REMOVE, {"key": snapshot_id}))

    async def load(self, snapshot_id: str) -> SnapshotRow | None:
        await self._journal.written()
        ask = select(snapshots).where(snapshots.c.id == snapshot_id)
        row = await self._engine.run(lambda connection: connection.execute(ask).one_or_none())
        return None if row is None else _snapshot(row)

    async def of_tenant(self, tenant_id: str, kind: str | None) -> list[SnapshotRow]:
        """A tenant's own and the system's, newest first."""
        await self._journal.written()
        ask = select(snapshots).where((snapshots.c.tenant_id == tenant_id) | (snapshots.c.type == "system"))
        if kind is not None:
            ask = ask.where(snapshots.c.type == kind)
        ask = ask.order_by(snapshots.c.created_at.desc())
        return [_snapshot(row) for row in await self._engine.run(lambda connection: connection.execute(ask).all())]

    async def unfinished(self) -> list[SnapshotRow]:
        ask = select(snapshots).where(snapshots.c.status.in_(UNFINISHED))
        return [_snapshot(row) for row in await self._engine.run(lambda connection: connection.execute(ask).all())]

    async def ids(self, tenant_id: str | None = None) -> frozenset[str]:
        """Of all snapshots, or of one tenant's."""
        await self._journal.written()
        ask = select(snapshots.c.id)
        if tenant_id is not None:
            ask = ask.where(snapshots.c.tenant_id == tenant_id)
        return frozenset(await self._engine.run(lambda connection: connection.execute(ask).scalars().all()))


def _values(row: SnapshotRow) -> dict[str, Any]:
    return asdict(row) | {"build_args": dict(row.build_args), "labels": dict(row.labels)}


def _snapshot(row: Row[Any]) -> SnapshotRow:
    return SnapshotRow(**row._mapping)
