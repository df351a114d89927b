"""Who is calling: from an API key to a tenant."""

from __future__ import annotations

import hmac
import time
from datetime import UTC, datetime
from typing import Final, Protocol

from instavm.control.ids import key_hash, new_key
from instavm.control.rates import Rates
from instavm.control.store.accounts import AccountRows, KeyRow, Quota, Tenant
from instavm.control.store.schema import LOCAL_TENANT
from instavm.errors import AuthenticationError

FRESH_S: Final = 0.5
"""How long a good key is believed without looking again: a revoked key is refused within a second."""
KEPT: Final = 1024
USE_TOLD_S: Final = 60.0
"""How often at most the use of one key is written down."""
HINT_HEAD: Final = len("instavm_sk_") + 4


class Authenticator(Protocol):
    async def tenant_of(self, key: str) -> Tenant:
        """`key` is not empty. Raises: AuthenticationError, RateLimitError."""
        ...

    def forget(self) -> None:
        """Keys have changed: look again before one is believed."""
        ...


class KeyedAccounts:
    """Keys are made by the operator and looked up by their hash."""

    def __init__(self, rows: AccountRows, rates: Rates) -> None:
        self._rows = rows
        self._rates = rates
        self._seen: dict[str, tuple[float, Tenant]] = {}
        self._forgotten = 0
        """How often: what was looked up before the last time is not believed again."""
        self._told: dict[str, float] = {}

    async def tenant_of(self, key: str) -> Tenant:
        hashed = key_hash(key)
        tenant = await self._believed(hashed)
        self._rates.take(hashed)
        return tenant

    def forget(self) -> None:
        self._seen.clear()
        self._forgotten += 1

    async def _believed(self, hashed: str) -> Tenant:
        now = time.monotonic()
        until, tenant = self._seen.get(hashed, (0.0, None))
        if tenant is not None and now < until:
            return tenant
        self._seen.pop(hashed, None)
        looked = self._forgotten
        found = await self._rows.by_hash(hashed)
        if found is None or not hmac.compare_digest(found[0], hashed):
            raise AuthenticationError("this API key is not known here, or was revoked")
        if len(self._seen) >= KEPT:
            self._seen.clear()
            self._told.clear()
        if looked == self._forgotten:
            self._seen[hashed] = (time.monotonic() + FRESH_S, found[1])
        if now >= self._told.get(hashed, 0.0):
            self._told[hashed] = now + USE_TOLD_S
            await self._rows.used(hashed, datetime.now(UTC))
        return found[1]


class LocalAccounts:
    """Behind a private socket: whoever may open it is its owner, so any key stands for the local tenant."""

    def __init__(self, rows: AccountRows) -> None:
        self._rows = rows
        self._tenant: Tenant | None = None

    async def tenant_of(self, key: str) -> Tenant:
        if self._tenant is None:
            self._tenant = await self._rows.tenant(LOCAL_TENANT)
        return self._tenant

    def forget(self) -> None:
        self._tenant = None


class Keys:
    """Making, listing and revoking API keys."""

    def __init__(self, rows: AccountRows) -> None:
        self._rows = rows

    async def create(self, description: str, tenant: str = LOCAL_TENANT) -> tuple[int, str]:
        """Returns: the id, and the key itself, which cannot be had again. A tenant is made when needed."""
        key = new_key()
        await self._rows.add_tenant(Tenant(tenant, tenant, None))
        hint = f"{key[:HINT_HEAD]}…{key[-4:]}"
        return await self._rows.add_key(tenant, key_hash(key), hint, description), key

    async def list(self, tenant: str | None = None) -> list[KeyRow]:
        return await self._rows.keys(tenant)

    async def describe(self, key_id: int, description: str) -> None:
        await self._rows.describe(key_id, description)

    async def revoke(self, key_id: int, tenant: str | None = None) -> bool:
        """Returns: False when there was nothing to revoke. Takes effect within a second."""
        return await self._rows.revoke(key_id, tenant)


class Tenants:
    """Listing tenants, and setting what each may have."""

    def __init__(self, rows: AccountRows) -> None:
        self._rows = rows

    async def list(self) -> list[Tenant]:
        return await self._rows.tenants()

    async def set_quota(self, tenant: str, quota: Quota) -> bool:
        """Returns: False when there is no such tenant."""
        return await self._rows.set_quota(tenant, quota)
