"""Where the server listens, and who may come in.

A private socket is its own credential: it lies in a folder that only its owner can enter, and on top of that
the kernel is asked, for every connection, whether the other end is that owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from instavm.errors import HostNotReady

BACKLOG: Final = 1024


class Traffic:
    """How many connections are open, and since when there has been none."""

    def __init__(self) -> None:
        self.open = 0
        self.quiet_since = time.monotonic()

    def came(self) -> None:
        self.open += 1

    def went(self) -> None:
        self.open -= 1
        self.quiet_since = time.monotonic()


def private_protocol(traffic: Traffic) -> type[HttpToolsProtocol]:
    """HTTP for a private socket: counts connections, and closes those of other users at once."""

    class PrivateProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            traffic.came()
            super().connection_made(transport)
            if _peer_uid(transport) != os.geteuid():
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            traffic.went()
            super().connection_lost(exc)

    return PrivateProtocol


def on_tcp(host: str, port: int) -> socket.socket:
    """Raises: HostNotReady, when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return _bound(listener, (host, port), f"{host}:{port}")


def on_socket(path: Path) -> socket.socket:
    """A Unix socket, mode 0600. What lies at `path` is replaced: whoever calls holds the lock of that place.

    Raises: HostNotReady.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.fchmod(listener.fileno(), 0o600)
    return _bound(listener, str(path), str(path))


def forget(listener: socket.socket) -> None:
    """Remove the name of a Unix socket that nobody shall find any more; other sockets have none."""
    if listener.family == socket.AF_UNIX:
        Path(listener.getsockname()).unlink(missing_ok=True)


def _bound(listener: socket.socket, address: Any, name: str) -> socket.socket:
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        try:
            listener.bind(address)
        except OSError as exc:
            raise HostNotReady(f"cannot listen on {name}: {exc.strerror or exc}") from exc
        listener.setblocking(False)
        undo.pop_all()
    return listener


def _peer_uid(transport: asyncio.BaseTransport) -> int:
    peer = transport.get_extra_info("socket")
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])
