"""The embedded server: one per user on this machine, started by whoever needs it first and shared by all.

Who holds `start.lock` may start it, replace it or let it end. The lock is handed to the new server and kept
until that one listens, so a client that is interrupted in between opens no gap.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instavm.client import forks
from instavm.client.calls.health import health
from instavm.client.errors import from_answer
from instavm.errors import HostNotReady, NetworkError
from instavm.settings import Places
from instavm.version import __version__
from instavm.wire.base import PROTOCOL
from instavm.wire.health import Health

COMMAND: tuple[str, ...] = (sys.executable, "-m", "instavm.serve", "--embedded")
NEEDS: Final = ("fastapi", "sqlalchemy", "uvicorn")
START_S: Final = 120.0
"""How long a server may take until it listens."""
ANSWER_S: Final = 10.0
END_S: Final = 60.0
"""How long a replaced server may take to end."""
SOCKET_PATH_BYTES: Final = 107
"""The kernel's limit for the name of a Unix socket."""
READY: Final = b"ready\n"


Identity = tuple[int, int, int]
_answered: set[Identity | None] = set()
"""Sockets on which a server of our version has answered in this process."""


@dataclass(frozen=True, slots=True)
class Running:
    pid: int
    health: Health


class Embedded:
    def __init__(self, places: Places, command: Sequence[str] | None = None) -> None:
        self._places = places
        self._command = command or COMMAND

    @property
    def socket(self) -> Path:
        return self._places.socket

    def ensure(self, again: bool = False) -> None:
        """Return when a server of our version answers on `socket`; start or replace it when needed. Blocks.

        A socket that has answered in this process is not asked a second time, unless `again` says that it
        failed since.
        Raises: HostNotReady, with the server's own words when it could not start; NetworkError when it hangs.
        """
        try:
            self._ensure(again)
        except OSError as exc:
            raise HostNotReady(f"the embedded server cannot be reached or started: {exc}") from exc

    def _ensure(self, again: bool) -> None:
        if not again and _identity(self.socket) in _answered:
            return
        found = self._running()
        if found is None or not _fits(found):
            with self._locked() as lock:
                self._ensure_alone(lock)
        if (identity := _identity(self.socket)) is not None:
            _answered.add(identity)

    def _ensure_alone(self, lock: int) -> None:
        found = self._running()
        if found is not None and not _fits(found):
            _replace(found)
            found = None
        if found is None:
            self._start(lock)

    def _running(self) -> Running | None:
        """Who answers on the socket; None when nobody listens, or the one who did is ending."""
        connection = _UnixConnection(self.socket)
        try:
            connection.request("GET", health().path)
            response = connection.getresponse()
            return Running(connection.peer_pid(), health().read(response.read()))
        except TimeoutError:
            raise NetworkError(f"the embedded server does not answer; see {self._places.control_log}") from None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Never unlocked, only closed: the server that was started holds the same lock until it is ready."""
        import fcntl  # noqa: PLC0415 (this module is loaded also where there is none)

        _private_dir(self._places.runtime_dir)
        lock = os.open(self._places.start_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with forks.private(lock):
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield lock
        finally:
            os.close(lock)

    def _start(self, lock: int) -> None:
        missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            raise HostNotReady(
                f"the embedded server needs {', '.join(missing)}: pip install 'instavm-selfhosted[server]',"
                " or name a server with base_url or INSTAVM_BASE_URL"
            )
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES:
            raise HostNotReady(f"{self.socket} is too long for a socket: set INSTAVM_RUNTIME_DIR to a shorter path")
        reader, writer = os.pipe()
        try:
            with forks.private(reader, writer):
                self._spawn(lock, writer)
            os.close(writer)
            writer = -1
            with forks.private(reader):
                said = _read_all(reader, START_S)
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)
        if said != READY:
            raise from_answer(503, said) if said else HostNotReady(self._last_words())

    def _spawn(self, lock: int, writer: int) -> None:
        """In a session of its own, so that neither Ctrl-C nor the end of the terminal reaches it."""
        self._places.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = os.open(self._words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            subprocess.run(
                [*self._command, "--ready-fd", str(writer), "--lock-fd", str(lock)],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                pass_fds=(writer, lock),
                start_new_session=True,
                env={name: value for name, value in os.environ.items() if name != "INSTAVM_API_KEY"},
                check=False,
            )
        finally:
            os.close(words)

    @property
    def _words(self) -> Path:
        """What the server prints before its log is open: a traceback, when it could not even be loaded."""
        return self._places.server_log.with_suffix(".err")

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._words.read_text(errors="replace").strip().splitlines()
            if lines:
                return f"the embedded server could not start: {lines[-1]} (see {self._words})"
        return f"the embedded server ended before it was ready; see {self._places.server_log}"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("embedded", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def peer_pid(self) -> int:
        """Who listens, according to the kernel."""
        raw = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", raw)[0])


def _identity(path: Path) -> Identity | None:
    """Which socket it is: another server makes another one. None, which never answers, when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _fits(found: Running) -> bool:
    return (found.health.version, found.health.protocol) == (__version__, PROTOCOL)


def _replace(found: Running) -> None:
    """End a server of another version, if it has no sandbox. Raises: HostNotReady."""
    if found.health.sandboxes:
        raise HostNotReady(
            f"an embedded server of version {found.health.version} (pid {found.pid}) is running with"
            f" {found.health.sandboxes} sandboxes, and this is version {__version__}: end its programs first"
        )
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(found.pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            if not select.select([process], [], [], END_S)[0]:
                raise HostNotReady(
                    f"the embedded server of version {found.health.version} (pid {found.pid}) does not end"
                )
        finally:
            os.close(process)


def _private_dir(path: Path) -> None:
    """A folder that only we can look into. Raises: HostNotReady, when somebody else made it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise HostNotReady(f"{path} must belong to us and be closed to others (mode 0700)")


def _read_all(reader: int, deadline_s: float) -> bytes:
    """Everything until the other end is closed. Raises: HostNotReady, when that takes too long."""
    said, until = b"", time.monotonic() + deadline_s
    while select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(reader, 65536)
        if not piece:
            return said
        said += piece
    raise HostNotReady(f"the embedded server was not ready within {deadline_s:g} s")
