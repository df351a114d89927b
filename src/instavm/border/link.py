"""Messages between control and node: msgpack, each with its length in front, both ways at once.

kind, number of the call, body
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, Final

import anyio
import msgpack

from instavm.wire.text import presentable

log = logging.getLogger(__name__)

LENGTH: Final = struct.Struct("!I")
MESSAGE_MAX: Final = 128 << 20
"""More than the longest result: two streams and the rich outputs of one command."""
BEHIND_MAX: Final = 64 << 20
"""Bytes that the other side may be behind before it is given up."""
TOGETHER: Final = 64 << 10
WINDOW_BYTES: Final = 1 << 20
"""How much of a stream may be on its way."""


class Kind(IntEnum):
    CALL = 1  # control to node: [method, {parameter: value}]
    CANCEL = 2
    PIECE = 3  # bytes of the stream that is a parameter; its end is None
    MORE = 4  # to either side: so many bytes of a stream have been used, as many may follow
    RESULT = 5  # node to control, last of a call
    ERROR = 6  # the same, with what was raised; None when it was cancelled
    TOLD = 7  # [parameter, arguments]: a callback's
    ITEM = 8  # bytes of the stream that is the result
    ENDED = 9  # no call's: a sandbox ended by itself
    SIGNAL = 10  # no call's, node to control: the server was asked to end
    PING = 11  # no call's, control to node: answered with a PONG of the same number as soon as it is read
    PONG = 12


class Link(asyncio.Protocol):
    """`take` gets every message as it arrives, on the event loop; what breaks the rules ends the link.

    Text arrives as Unicode: a lone surrogate, which a guest's names may hold and JSON can't, becomes U+FFFD.
    """

    def __init__(self, take: Callable[[Kind, int, Any], None]) -> None:
        self._take = take
        self._transport: asyncio.Transport | None = None
        self._inbox = bytearray()
        self.closed = anyio.Event()

    def send(self, kind: Kind, call: int, body: Any = None) -> None:
        """Never waits. To a side that is gone, or hopelessly behind, nothing is sent."""
        if self._transport is None or self._transport.is_closing():
            return
        message = _packed(kind, call, body)
        if len(message) < TOGETHER:
            self._transport.write(LENGTH.pack(len(message)) + message)
        else:  # put together it would be in memory once more
            self._transport.write(LENGTH.pack(len(message)))
            self._transport.write(message)
        if self._transport.get_write_buffer_size() > BEHIND_MAX:
            log.error("the other side of the border does not read any more")
            self._transport.abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        inbox = self._inbox
        inbox += data
        start = 0
        try:
            while len(inbox) - start >= LENGTH.size:
                (size,) = LENGTH.unpack_from(inbox, start)
                if size > MESSAGE_MAX:
                    raise ValueError(f"a message of {size} bytes")
                end = start + LENGTH.size + size
                if len(inbox) < end:
                    break
                kind, call, body = msgpack.unpackb(
                    memoryview(inbox)[start + LENGTH.size : end], unicode_errors="replace", timestamp=3
                )
                start = end
                self._take(Kind(kind), int(call), body)
        except (ValueError, TypeError, msgpack.UnpackException) as exc:
            log.error("the other side of the border broke its rules: %s", str(exc)[:200])
            assert self._transport is not None
            self._transport.abort()
            return
        if start:
            del inbox[:start]


def _packed(kind: Kind, call: int, body: Any) -> bytes:
    try:
        return _pack((int(kind), call, body))
    except ValueError:  # nested deeper than messages may be, as only values of a guest can be
        return _pack((int(kind), call, presentable(body)))


def _pack(message: object) -> bytes:
    packed = msgpack.packb(message, default=_plain, unicode_errors="surrogatepass", datetime=True)
    assert isinstance(packed, bytes)
    return packed


def _plain(value: object) -> object:
    return list(value) if isinstance(value, set | frozenset) else str(value)


async def linked(end: socket.socket, take: Callable[[Kind, int, Any], None]) -> Link:
    """Take up one end of a connected pair."""
    end.setblocking(False)
    _, link = await asyncio.get_running_loop().create_connection(lambda: Link(take), sock=end)
    return link
