"""Where the server listens, and who may come in.

A private socket is its own credential: it lies in a folder that only its owner can enter, and on top of that
the kernel is asked, for every connection, whether the other end is that owner.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

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


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to serve. `private`: a socket that only its owner can open; any API key means the local user."""

    socket: socket.socket
    private: bool
    ends_when_idle: bool = False
    owner: int = field(default_factory=os.geteuid)
    """Whose a private socket is."""
    start_lock: int | None = None
    """Descriptor of the lock that clients start servers under; taken before an idle server ends."""
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def ports(self) -> tuple[int, ...]:
        """The TCP port that it is reached on, if it is."""
        return () if self.socket.family == socket.AF_UNIX else (self.socket.getsockname()[1],)

    def options(self) -> list[str]:
        """What a process that inherits it has to be told."""
        flags = {"--private": self.private, "--ends-when-idle": self.ends_when_idle}
        return [*(flag for flag, on in flags.items() if on), "--owner", str(self.owner)]


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
    """Remove the name of a Unix socket that nobody shall find any more; other sockets have none.

    Where that is not allowed, it is left to who made it: a socket that nobody listens on is found by nobody either.
    """
    if listener.family == socket.AF_UNIX:
        with contextlib.suppress(PermissionError):
            Path(listener.getsockname()).unlink(missing_ok=True)


@contextlib.contextmanager
def named(listener: socket.socket) -> Iterator[None]:
    """When the block ends, the name of a Unix socket is gone, unless another socket has it by then."""
    if listener.family != socket.AF_UNIX:
        yield
        return
    path = Path(listener.getsockname())
    ours = _identity(path)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if _identity(path) == ours:
                path.unlink()


def _identity(path: Path) -> tuple[int, int, int]:
    """Of this file, and not of a later one that was given the same number."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_ctime_ns


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


def peer_uid(peer: socket.socket) -> int:
    """Who is at the other end of a Unix socket, according to the kernel."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])
