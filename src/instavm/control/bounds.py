"""How much of the server one account may occupy at one time, whatever its quotas say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from instavm.errors import RateLimitError


class Bound:
    """At most `limit` of something for each account. `what`: its name, in the plural."""

    def __init__(self, what: str, limit: int) -> None:
        self._what = what
        self._limit = limit
        self._taken: Counter[str] = Counter()

    def take(self, tenant_id: str) -> None:
        """Raises: RateLimitError, which names the bound."""
        if self._taken[tenant_id] >= self._limit:
            raise RateLimitError(
                f"this account has {self._limit} {self._what} under way, which is the limit; wait for some"
            )
        self._taken[tenant_id] += 1

    def release(self, tenant_id: str) -> None:
        self._taken[tenant_id] -= 1
        if not self._taken[tenant_id]:
            del self._taken[tenant_id]

    @contextmanager
    def held(self, tenant_id: str) -> Iterator[None]:
        """One of them, for as long as the block lasts. Raises: as `take`."""
        self.take(tenant_id)
        try:
            yield
        finally:
            self.release(tenant_id)
