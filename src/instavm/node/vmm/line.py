"""A line to a socket of a VMM's.

As anyio's, but read by the event loop as soon as something comes. Anyio asks the socket, fails, has itself told and asks again
for every message, and most of ours are short.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final, Self

import anyio
from anyio.abc import ByteStream

AHEAD_BYTES: Final = 128 << 10
"""Half of what may have been read before anybody wants it."""


class Line(ByteStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._closed = False

    @classmethod
    async def dial(cls, place: Path) -> Self:
        """Raises OSError: nobody listens there."""
        return cls(*await asyncio.open_unix_connection(place, limit=AHEAD_BYTES))

    @classmethod
    async def over(cls, end: socket.socket) -> Self:
        """Take over a connected socket."""
        return cls(*await asyncio.open_unix_connection(sock=end, limit=AHEAD_BYTES))

    async def receive(self, max_bytes: int = 65536) -> bytes:
        try:
            data = await self._reader.read(max_bytes)
        except OSError as exc:
            raise anyio.BrokenResourceError from exc
        if self._closed:
            raise anyio.ClosedResourceError
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        try:
            self._writer.write(item)
            await self._writer.drain()
        except OSError as exc:
            raise anyio.BrokenResourceError from exc

    async def send_eof(self) -> None:
        self._writer.write_eof()

    async def aclose(self) -> None:
        """What the other side has not taken by now is dropped."""
        self._closed = True
        self._writer.transport.abort()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # it was broken already
