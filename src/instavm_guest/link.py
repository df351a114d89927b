"""The line to the host: a virtio-serial port under QEMU, a vsock listener under Firecracker, bytes either way."""

from __future__ import annotations

import os
import select
import socket
import time

PORT_NAME = "instavm.agent"
VSOCK_PORT = 1024
BUFFER = 4096
"""What the guest's kernel hands out at once of a virtio-serial port: one buffer of this size."""
READ_MAX = 256 << 10
HOST_AWAY_S = 0.05
"""How long to wait before looking again whether the host has come back; the port has no event for it."""


class SerialLink:
    """A virtio-serial port, greeted once. Reading blocks until the host is there; writing until it reads."""

    def __init__(self, path: str, greeting: bytes) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.write(greeting)

    def fileno(self) -> int:
        return self._fd

    def read(self) -> bytes | None:
        """What has arrived; b"" when the host has gone away (it may come back)."""
        data = self._read()
        if len(data) < BUFFER:
            return data
        pieces, size = [data], len(data)
        while len(data) == BUFFER and size < READ_MAX:  # a full buffer: more is likely there already
            data = self._read()
            pieces.append(data)
            size += len(data)
        return b"".join(pieces)

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, BUFFER)
        except BlockingIOError:
            return b""

    def write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                self._wait_writable()

    def _wait_writable(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        for _, event in poll.poll():
            if event & select.POLLHUP:
                time.sleep(HOST_AWAY_S)


class VsockLink:
    """A listener on the sandbox's own CID; the host connects, and connects again after a restore.

    Its descriptor is the host's connection, and the listener while there is none: who polls it need not know which. Each
    connection is greeted: one that the host's side made before a saved machine's vsock was reset looks like one that lives,
    until nobody greets.
    """

    def __init__(self, greeting: bytes, port: int = VSOCK_PORT) -> None:
        self._greeting = greeting
        self._server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        self._server.bind((socket.VMADDR_CID_ANY, port))
        self._server.listen(4)
        self._fd = os.dup(self._server.fileno())
        self._there = False
        self._accept()

    def fileno(self) -> int:
        return self._fd

    def read(self) -> bytes | None:
        """What has arrived; b"" for nothing, None when the host has gone away (it may come back)."""
        if not self._there:
            self._accept()
            return b""
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            data = b""
        if data:
            return data
        self._hang_up()
        return None

    def write(self, data: bytes) -> None:
        """To whoever is there; when that is nobody, all of it to who comes next."""
        while True:
            if not self._there:
                self._accept()
            try:
                self._write(data)
                return
            except OSError:
                self._hang_up()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def _accept(self) -> None:
        peer, _ = self._server.accept()
        with peer:
            os.dup2(peer.fileno(), self._fd, inheritable=False)
        self._there = True
        try:
            self._write(self._greeting)
        except OSError:
            self._hang_up()

    def _hang_up(self) -> None:
        os.dup2(self._server.fileno(), self._fd, inheritable=False)
        self._there = False


def open_link(greeting: bytes) -> SerialLink | VsockLink:
    """Whichever of the two this machine has. Waits for the port to appear; raises TimeoutError after 10 s."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        path = _find_port()
        if path:
            return SerialLink(path, greeting)
        if os.path.exists("/dev/vsock"):
            return VsockLink(greeting)
        time.sleep(0.02)
    raise TimeoutError("neither a virtio-serial port nor vsock is there")


def _find_port() -> str | None:
    base = "/sys/class/virtio-ports"
    for name in os.listdir(base) if os.path.isdir(base) else ():
        with open(f"{base}/{name}/name") as file:
            if file.read().strip() == PORT_NAME:
                return f"/dev/{name}"
    return None
