"""The server name in a TLS ClientHello (RFC 8446, 4.1.2; RFC 6066, 3). What is not well-formed is refused, not guessed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from instavm import hostnames

HANDSHAKE: Final = 22
CLIENT_HELLO: Final = 1
SERVER_NAME, ENCRYPTED_HELLO = 0, 0xFE0D
HELLO_MAX: Final = 64 << 10


class Malformed(ValueError):
    """Not a ClientHello."""


@dataclass(frozen=True, slots=True)
class Hello:
    """`name`: lower case, None when there is none. `encrypted`: it holds another one that nobody but the server can read."""

    name: str | None
    encrypted: bool


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise Malformed("it ends too early")
        part, self._at = self._data[self._at : end], end
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> _Bytes:
        return _Bytes(self.take(self.number(size)))

    @property
    def left(self) -> bool:
        return self._at < len(self._data)


def read(data: bytes) -> Hello | None:
    """None: more bytes are needed. Raises Malformed; BadName (the server name is none)."""
    message = _handshake(data)
    if message is None:
        return None
    body = _Bytes(message)
    body.take(2 + 32)  # version, random
    for size in (1, 2, 1):  # session id, cipher suites, compression methods
        body.vector(size)
    return _extensions(body.vector(2)) if body.left else Hello(None, False)


def _handshake(data: bytes) -> bytes | None:
    """The ClientHello's body, put together from as many records as it came in."""
    message, at = b"", 0
    while len(data) >= at + 5:
        if data[at] != HANDSHAKE or data[at + 1] != 3:
            raise Malformed("it is no TLS handshake")
        length = int.from_bytes(data[at + 3 : at + 5])
        message += data[at + 5 : at + 5 + length]
        at += 5 + length
        if len(message) >= 4:
            if message[0] != CLIENT_HELLO:
                raise Malformed("it is no ClientHello")
            wanted = 4 + int.from_bytes(message[1:4])
            if wanted > HELLO_MAX:
                raise Malformed("it is too long")
            if len(message) >= wanted:
                return message[4:wanted]
        if not length:
            raise Malformed("a record is empty")
    return None


def _extensions(extensions: _Bytes) -> Hello:
    name, encrypted = None, False
    seen = set()
    while extensions.left:
        kind, content = extensions.number(2), extensions.vector(2)
        if kind in seen:
            raise Malformed("an extension comes twice")
        seen.add(kind)
        if kind == SERVER_NAME:
            names = content.vector(2)
            if names.number(1) != 0:
                raise Malformed("its name is no host name")
            name = _host(names.vector(2))
            if names.left:
                raise Malformed("it has two names")
        encrypted = encrypted or kind == ENCRYPTED_HELLO
    return Hello(name, encrypted)


def _host(content: _Bytes) -> str:
    return hostnames.read(content._data.decode("latin-1"))
