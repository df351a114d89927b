"""The connection to SQLite.

A transaction runs as a whole in one worker thread. Going through an async driver would cost a change of
threads for every
statement: the four inserts of a new session took 5.3 ms that way and take 1 ms this way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Connection

T = TypeVar("T")

BUSY_TIMEOUT_MS: Final = 5_000
THREADS: Final = 4
CACHE_KIB: Final = 512
"""Pages that each connection keeps; SQLite's own 2 MiB are more than a server's rows in use."""


class Engine:
    """One database file, made with mode 0600 when it is not there."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        self._engine = create_engine(URL.create("sqlite", database=str(path)))
        event.listen(self._engine, "connect", _pragmas)
        event.listen(self._engine, "begin", _begin)
        self._threads = anyio.CapacityLimiter(THREADS)

    async def run(self, work: Callable[[Connection], T], *, exclusive: bool = False) -> T:
        """Run `work` in one transaction, in a thread. What it raises is raised, after a roll back.

        What it changes is on disk when this returns. exclusive: no other process writes between what it reads and what it
        writes.
        """
        return await anyio.to_thread.run_sync(self.transact, work, exclusive, limiter=self._threads)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._engine.dispose, limiter=self._threads)

    def transact(self, work: Callable[[Connection], T], exclusive: bool = False) -> T:
        """As `run`, in this thread."""
        with self._engine.connect().execution_options(exclusive=exclusive) as connection, connection.begin():
            return work(connection)


def _begin(connection: Connection) -> None:
    """The driver itself begins a transaction at the first INSERT, so CREATE and ALTER TABLE before it would not be in it."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options()["exclusive"] else "BEGIN")


def _pragmas(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # `_begin` does it
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # what was committed survives a power cut
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "foreign_keys=ON",
        f"cache_size=-{CACHE_KIB}",
        "temp_store=MEMORY",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
