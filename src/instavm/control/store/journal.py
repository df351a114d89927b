"""The one writer. Statements are written in the order they were appended, many in one transaction.

Running sandboxes never wait for the disk: what must be durable before an answer goes out waits with
`written`, all else is appended and forgotten, and gathered for a moment first. While the database is locked or
the disk is full, statements queue up and are written once it is well again.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import anyio
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError
from sqlalchemy.sql import Executable

from instavm.control.store.engine import Engine
from instavm.errors import Conflict, InstaVMError

log = logging.getLogger(__name__)

BATCH: Final = 256
LINGER_S: Final = 0.1
"""How long writes that nobody waits for are gathered, so that a busy session's counts become one transaction."""
RETRY_S: Final = 0.5
"""Pause before a locked database is tried again; SQLite has no way to be told when the lock is gone."""


@dataclass(frozen=True, slots=True)
class Write:
    """One row to write: a statement made once per program, and this row's values.

    expects: what must be so for the statement to find its one row, in words; when it finds none, nothing is written. None =
    it may find any number of rows.
    """

    statement: Executable
    values: Mapping[str, Any]
    expects: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """Writes that are made together or not at all."""

    writes: tuple[Write, ...]
    number: int


class Journal:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: deque[Entry] = deque()
        self._appended = 0
        self._done = 0
        self._refused: dict[int, InstaVMError] = {}
        """Why an entry was not written, by its number, until its waiters have been told."""
        self._waiters: Counter[int] = Counter()
        """How many wait for each entry."""
        self._work = anyio.Event()
        self._awaited = anyio.Event()
        self._progress = anyio.Event()

    def append(self, *writes: Write) -> int:
        """Queue writes that are made together, in one transaction. Returns: a mark for `written`."""
        self._appended += 1
        self._waiting.append(Entry(writes, self._appended))
        self._work.set()
        return self._appended

    async def written(self, mark: int | None = None) -> None:
        """Wait until everything up to `mark` is on disk; None = everything appended so far.

        Raises: Conflict, when a write of the entry that `mark` stands for did not find the row that it expects;
        InstaVMError, when the database refused it.
        """
        if mark is None:
            await self._reached(self._appended)
            return
        self._waiters[mark] += 1
        try:
            await self._reached(mark)
            if (refused := self._refused.get(mark)) is not None:
                raise refused.with_traceback(None)
        finally:
            self._waiters[mark] -= 1
            if not self._waiters[mark]:
                del self._waiters[mark]
                self._refused.pop(mark, None)

    async def _reached(self, number: int) -> None:
        while self._done < number:
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

    async def _write(self, batch: list[Entry]) -> None:
        try:
            await self._engine.run(lambda connection: _execute(connection, batch))
        except OperationalError as exc:
            log.warning("the database cannot be written now, %d records wait: %s", len(self._waiting), exc.orig)
            await anyio.sleep(RETRY_S)
            return
        except Exception as exc:
            if len(batch) > 1:  # which of them it is shows when they are written one by one
                await self._write(batch[:1])
                return
            self._refuse(batch[0], exc)
        for _ in batch:
            self._waiting.popleft()
        self._done = batch[-1].number
        self._progress.set()
        self._progress = anyio.Event()

    def _refuse(self, entry: Entry, exc: Exception) -> None:
        if isinstance(exc, Conflict):
            log.error("a record is not written: %s", exc)
        else:
            log.error("a record is refused by the database and is not written", exc_info=exc)
            exc = InstaVMError("internal error: a record could not be written")
        if entry.number in self._waiters:
            self._refused[entry.number] = exc


def _execute(connection: Connection, batch: Sequence[Entry]) -> None:
    """In order; rows of one statement that follow each other go together, such as the counts of a busy session.

    Raises: Conflict: a write did not find the row that it expects.
    """
    writes = (write for entry in batch for write in entry.writes)
    for _, alike in groupby(writes, key=lambda write: (id(write.statement), write.expects, *write.values)):
        first, *more = alike
        if first.expects is None:
            rows = [dict(write.values) for write in (first, *more)]
            connection.execute(first.statement, rows if more else rows[0])
            continue
        for write in (first, *more):
            if connection.execute(write.statement, dict(write.values)).rowcount != 1:
                raise Conflict(f"it was changed meanwhile: {write.expects} does not hold any more")
