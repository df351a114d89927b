"""The one writer. Statements are written in the order they were appended, many in one transaction.

Running sandboxes never wait for the disk: what must be durable before an answer goes out waits with
`written`, all else is appended and forgotten, and gathered for a moment first. While the database is locked or
the disk is full, statements queue up and are written once it is well again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import anyio
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.sql import Executable

from instavm.control.store.engine import Engine

log = logging.getLogger(__name__)

BATCH: Final = 256
LINGER_S: Final = 0.1
"""How long writes that nobody waits for are gathered, so that a busy session's counts become one transaction."""
RETRY_S: Final = 0.5
"""Pause before a locked database is tried again; SQLite has no way to be told when the lock is gone."""


@dataclass(frozen=True, slots=True)
class Write:
    """One row to write: a statement made once per program, and this row's values."""

    statement: Executable
    values: Mapping[str, Any]


class Journal:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Write] = deque()
        self._appended = 0
        self._done = 0
        self._work = anyio.Event()
        self._awaited = anyio.Event()
        self._progress = anyio.Event()

    def append(self, *writes: Write) -> int:
        """Queue writes. Returns: a mark for `written`."""
        self._waiting.extend(writes)
        self._appended += len(writes)
        self._work.set()
        return self._appended

    async def written(self, mark: int | None = None) -> None:
        """Wait until everything up to `mark` is in the database; None = everything appended so far."""
        upto = self._appended if mark is None else mark
        while self._done < upto:
            self._awaited.set()
            await self._progress.wait()

    async def run(self) -> None:
        """Write for ever. Owned by the store; ends by being cancelled."""
        while True:
            await self._work.wait()
            with anyio.move_on_after(LINGER_S):
                await self._awaited.wait()
            self._work, self._awaited = anyio.Event(), anyio.Event()
            while self._waiting:
                await self._write([self._waiting[i] for i in range(min(BATCH, len(self._waiting)))])

    async def _write(self, batch: list[Write]) -> None:
        try:
            await self._engine.run(lambda connection: _execute(connection, batch))
        except OperationalError as exc:
            log.warning("the database cannot be written now, %d statements wait: %s", len(self._waiting), exc.orig)
            await anyio.sleep(RETRY_S)
            return
        except SQLAlchemyError:
            if len(batch) > 1:
                await self._write(batch[:1])
                return
            log.exception("one statement was refused by the database and is dropped")
        for _ in batch:
            self._waiting.popleft()
        self._done += len(batch)
        self._progress.set()
        self._progress = anyio.Event()


def _execute(connection: Connection, batch: list[Write]) -> None:
    """In order; rows of one statement that follow each other go together, such as the counts of a busy session."""
    for _, alike in groupby(batch, key=lambda write: (id(write.statement), *write.values)):
        first, *more = alike
        rows = [dict(write.values) for write in (first, *more)]
        connection.execute(first.statement, rows if more else rows[0])
