"""Tenants and their API keys. Of a key only the hash is kept."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import insert, select, update

from instavm.control.store.engine import Engine
from instavm.control.store.schema import api_keys, tenants


@dataclass(frozen=True, slots=True)
class Tenant:
    id: str
    name: str
    email: str | None


@dataclass(frozen=True, slots=True)
class KeyRow:
    """`hint` is what may be shown of a key: its first and last characters."""

    id: int
    tenant_id: str
    hint: str
    description: str
    created_at: datetime
    revoked_at: datetime | None


class AccountRows:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def by_hash(self, key_hash: str) -> tuple[str, Tenant] | None:
        """The stored hash and the tenant of a key that is not revoked."""
        ask = (
            select(api_keys.c.hash, tenants.c.id, tenants.c.name, tenants.c.email)
            .join(tenants, tenants.c.id == api_keys.c.tenant_id)
            .where(api_keys.c.hash == key_hash, api_keys.c.revoked_at.is_(None))
        )
        row = await self._engine.run(lambda connection: connection.execute(ask).one_or_none())
        return None if row is None else (row.hash, Tenant(row.id, row.name, row.email))

    async def tenant(self, tenant_id: str) -> Tenant:
        ask = select(tenants).where(tenants.c.id == tenant_id)
        row = await self._engine.run(lambda connection: connection.execute(ask).one())
        return Tenant(row.id, row.name, row.email)

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

    async def keys(self) -> list[KeyRow]:
        ask = select(api_keys).order_by(api_keys.c.id)
        rows = await self._engine.run(lambda connection: connection.execute(ask).all())
        return [KeyRow(r.id, r.tenant_id, r.hint, r.description, r.created_at, r.revoked_at) for r in rows]

    async def revoke(self, key_id: int) -> bool:
        """Returns: False when there is no such key, or it was revoked before."""
        change = (
            update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=datetime.now(UTC))
        )
        return bool(await self._engine.run(lambda connection: connection.execute(change).rowcount))
