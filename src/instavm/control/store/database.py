"""Opening the database, and everything that is kept in it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio

from instavm.control.store.accounts import AccountRows
from instavm.control.store.egress import EgressRows
from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal
from instavm.control.store.repeats import RepeatRows
from instavm.control.store.seal import Seal
from instavm.control.store.sessions import SessionRows
from instavm.control.store.snapshots import SnapshotRows
from instavm.control.store.tasks import TaskRows
from instavm.control.store.upgrade import prepare

log = logging.getLogger(__name__)

FLUSH_S: Final = 10.0
"""How long closing waits for the last statements."""


class Store:
    """What control remembers between two lives of the server."""

    def __init__(self, engine: Engine, journal: Journal, seal: Seal) -> None:
        self.journal = journal
        self.accounts = AccountRows(engine)
        self.sessions = SessionRows(engine, journal)
        self.tasks = TaskRows(engine, journal, seal)
        self.snapshots = SnapshotRows(engine, journal)
        self.repeats = RepeatRows(engine, journal)
        self.egress = EgressRows(engine, journal)


@asynccontextmanager
async def open_store(path: Path) -> AsyncIterator[Store]:
    """Open (or make) the database at `path`, mode 0600. Raises: HostNotReady, when a newer version wrote it."""
    engine = await _opened(path)
    try:
        journal = Journal(engine)
        store = Store(engine, journal, Seal(path.with_suffix(".key")))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(journal.run)
            try:
                yield store
            finally:
                with anyio.move_on_after(FLUSH_S, shield=True) as flush:
                    await journal.written()
                if flush.cancelled_caught:
                    log.error("the last records could not be written to %s", path)
                tasks.cancel_scope.cancel()
    finally:
        await engine.aclose()


@asynccontextmanager
async def open_accounts(path: Path) -> AsyncIterator[AccountRows]:
    """Only tenants and keys, for a command beside a server that may be running. Raises: HostNotReady."""
    engine = await _opened(path)
    try:
        yield AccountRows(engine)
    finally:
        await engine.aclose()


async def _opened(path: Path) -> Engine:
    engine = Engine(path)
    try:
        await engine.run(lambda connection: prepare(connection, path), exclusive=True)
    except BaseException:
        await engine.aclose()
        raise
    return engine
