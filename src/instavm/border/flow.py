"""Bytes that cross the border as a stream: no more of them on their way than a window."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio

from instavm.border.link import WINDOW_BYTES


class Sending:
    """The side that has the bytes. `more` is told what the other side has used."""

    def __init__(self) -> None:
        self._room = WINDOW_BYTES
        self._moved: anyio.Event | None = None
        """Made by who waits: most calls have no stream."""

    def more(self, size: int) -> None:
        self._room += size
        if self._moved is not None:
            self._moved.set()

    async def pieces(self, source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """`source`, cut up, as fast as the other side takes it."""
        async for chunk in source:
            for start in range(0, len(chunk), WINDOW_BYTES):
                piece = chunk[start : start + WINDOW_BYTES]
                while self._room <= 0:
                    self._moved = anyio.Event()
                    await self._moved.wait()
                self._room -= len(piece)
                yield piece


class Receiving:
    """The side that wants them: a queue that `put` fills, and that says (`used`) what has been taken out of it."""

    def __init__(self, used: Callable[[int], None]) -> None:
        self._used = used
        self._waiting: deque[bytes] = deque()
        self._owed = 0
        self._whole = False
        self._broken: Exception | None = None
        self._moved: anyio.Event | None = None
        self._size = 0

    def put(self, piece: bytes) -> None:
        """Raises ValueError: more than there was room for."""
        self._size += len(piece)
        if self._size > 2 * WINDOW_BYTES:
            raise ValueError("more of a stream than was asked for")
        self._waiting.append(piece)
        self._wake()

    def end(self, broken: Exception | None = None) -> None:
        """No more will come. `broken` is raised behind what has come."""
        self._whole, self._broken = True, broken
        self._wake()

    def _wake(self) -> None:
        if self._moved is not None:
            self._moved.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._waiting:
                piece = self._waiting.popleft()
                self._size -= len(piece)
                yield piece
                self._owed += len(piece)
                if self._owed >= WINDOW_BYTES // 2:
                    self._used(self._owed)
                    self._owed = 0
            if self._whole:
                if self._broken is not None:
                    raise self._broken
                return
            self._moved = anyio.Event()
            await self._moved.wait()
