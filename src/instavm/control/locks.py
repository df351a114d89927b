"""Locks between processes: one server per state directory, and nobody starts one while another ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from instavm.errors import HostNotReady

ENDING_S: Final = 5.0
"""How long a server that holds the lock is waited for: it may be about to end."""


@contextlib.contextmanager
def only_server(path: Path) -> Iterator[None]:
    """Hold the lock of a state directory. Raises: HostNotReady, when another server works on it and stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as undo:
        lock = opened(path)
        undo.callback(os.close, lock)
        if not taken(lock):
            pid = _holder(lock)
            _wait_for_end(pid)
            if not taken(lock):
                raise HostNotReady(
                    f"another InstaVM server (pid {pid or 'unknown'}) works with {path.parent}:"
                    " use that one (INSTAVM_BASE_URL), or set INSTAVM_STATE_DIR to a directory of its own"
                )
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield


def opened(path: Path) -> int:
    """A lock that is not taken yet. Whoever inherits the descriptor shares it: it is held until all have closed it."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def taken(lock: int) -> bool:
    """Take a lock, if nobody else has it. Returns: whether it is ours now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: int) -> int | None:
    said = os.pread(lock, 32, 0).strip()
    return int(said) if said.isdigit() else None


def _wait_for_end(pid: int | None) -> None:
    """Wait for a process to end, at most `ENDING_S`."""
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            select.select([process], [], [], ENDING_S)
        finally:
            os.close(process)
