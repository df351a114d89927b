"""Tenants and their API keys. Of a key only the hash is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from instavm.control.store.engine import Engine
from instavm.control.store.schema import api_keys, tenants

QUOTA_COLUMNS = {
    "sandboxes": "max_sandboxes",
    "vcpus": "max_vcpus",
    "memory_mib": "max_memory_mib",
    "lifetime_s": "max_lifetime_s",
    "disk_mib": "max_disk_mib",
}


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may have at one time, and for how long each; None = what the settings say."""

    sandboxes: int | None = None
    vcpus: int | None = None
    memory_mib: int | None = None
    lifetime_s: int | None = None
    disk_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    name: str
    email: str | None
    quota: Quota = field(default_factory=Quota)


@dataclass(frozen=True, slots=True)
class KeyRow:
    """`hint` is what may be shown of a key: its first and last characters."""

    id: int
    tenant_id: str
    hint: str
    description: str
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None = None


class AccountRows:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def by_hash(self, key_hash: str) -> tuple[str, Tenant] | None:
        """The stored hash and the tenant of a key that is not revoked."""
        ask = (
            select(api_keys.c.hash, tenants)
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .where(api_keys.c.hash == key_hash, api_keys.c.revoked_at.is_(None))
        )
        row = await self._engine.run(lambda connection: connection.execute(ask).one_or_none())
        return None if row is None else (row.hash, _tenant(row))

    async def tenant(self, tenant_id: str) -> Tenant:
        ask = select(tenants).where(tenants.c.id == tenant_id)
        row = await self._engine.run(lambda connection: connection.execute(ask).one())
        return _tenant(row)

    async def tenants(self) -> list[Tenant]:
        ask = select(tenants).order_by(tenants.c.id)
        return [_tenant(row) for row in await self._engine.run(lambda connection: connection.execute(ask).all())]

    async def set_quota(self, tenant_id: str, quota: Quota) -> bool:
        """Returns: False when there is no such tenant. Sandboxes that are up stay."""
        values = {column: getattr(quota, name) for name, column in QUOTA_COLUMNS.items()}
        change = update(tenants).where(tenants.c.id == tenant_id).values(**values)
        return bool(await self._engine.run(lambda connection: connection.execute(change).rowcount))

    async def add_tenant(self, tenant: Tenant) -> None:
        """Make a tenant; one that is there already stays as it is."""
        add = (
            insert(tenants)
            .prefix_with("OR IGNORE")
            .values(id=tenant.id, name=tenant.name, email=tenant.email, created_at=datetime.now(UTC))
        )
        await self._engine.run(lambda connection: connection.execute(add))

    async def add_key(self, tenant_id: str, key_hash: str, hint: str, description: str) -> int:
        """Returns: the key's id, an integer as clients demand."""
        add = insert(api_keys).values(
            tenant_id=tenant_id,
            hash=key_hash,
            hint=hint,
            description=description,
            created_at=datetime.now(UTC),
        )
        inserted = await self._engine.run(lambda connection: connection.execute(add).inserted_primary_key)
        assert inserted is not None
        return int(inserted[0])

    async def keys(self, tenant_id: str | None = None) -> list[KeyRow]:
        """All keys ever made, or those of one tenant, oldest first."""
        ask = select(api_keys).order_by(api_keys.c.id)
        if tenant_id is not None:
            ask = ask.where(api_keys.c.tenant_id == tenant_id)
        return [_key(row) for row in await self._engine.run(lambda connection: connection.execute(ask).all())]

    async def describe(self, key_id: int, description: str) -> None:
        change = update(api_keys).where(api_keys.c.id == key_id).values(description=description)
        await self._engine.run(lambda connection: connection.execute(change))

    async def used(self, key_hash: str, at: datetime) -> None:
        change = update(api_keys).where(api_keys.c.hash == key_hash).values(last_used_at=at)
        await self._engine.run(lambda connection: connection.execute(change))

    async def revoke(self, key_id: int, tenant_id: str | None = None) -> bool:
        """Returns: False when there is no such key (of this tenant), or it was revoked before."""
        change = (
            update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=datetime.now(UTC))
        )
        if tenant_id is not None:
            change = change.where(api_keys.c.tenant_id == tenant_id)
        return bool(await self._engine.run(lambda connection: connection.execute(change).rowcount))


def _tenant(row: Row[Any]) -> Tenant:
    quota = Quota(**{name: getattr(row, column) for name, column in QUOTA_COLUMNS.items()})
    return Tenant(row.id, row.name, row.email, quota)


def _key(row: Row[Any]) -> KeyRow:
    return KeyRow(row.id, row.tenant_id, row.hint, row.description, row.created_at, row.revoked_at, row.last_used_at)
