"""Starts take turns: as many at one time as there are CPUs, first come, first served.

A start keeps the CPUs busy until it is over. Twenty that share two of them are all ready when the last one is; in turns half of
them are ready after half of that time, and the last one no later.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio

TURN_S: Final = 1.0
"""Longest turn: one that takes longer goes on beside the next, so that none that hangs keeps the others waiting."""


class Turns:
    def __init__(self, at_once: int, longest_s: float = TURN_S) -> None:
        self._limiter = anyio.CapacityLimiter(at_once)
        self._longest_s = longest_s

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Wait for a turn; it ends with the block, or when it has lasted too long."""
        turn = object()
        await self._limiter.acquire_on_behalf_of(turn)
        over = asyncio.get_running_loop().call_later(self._longest_s, self._end, turn)
        try:
            yield
        finally:
            over.cancel()
            self._end(turn)

    def _end(self, turn: object) -> None:
        if turn in self._limiter.statistics().borrowers:
            self._limiter.release_on_behalf_of(turn)
