"""Opening the database, and everything that is kept in it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import anyio
from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.engine import Connection

from instavm.control.store import schema
from instavm.control.store.accounts import AccountRows
from instavm.control.store.egress import EgressRows
from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal
from instavm.control.store.repeats import RepeatRows
from instavm.control.store.seal import Seal
from instavm.control.store.sessions import SessionRows
from instavm.control.store.snapshots import SnapshotRows
from instavm.control.store.tasks import TaskRows
from instavm.errors import HostNotReady

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
        await engine.run(lambda connection: _prepare(connection, path))
    except BaseException:
        await engine.aclose()
        raise
    return engine


def _prepare(connection: Connection, path: Path) -> None:
    if not inspect(connection).has_table("schema_version"):
        schema.metadata.create_all(connection)
        connection.execute(insert(schema.schema_version).values(version=schema.SCHEMA_VERSION))
        connection.execute(
            insert(schema.tenants).values(
                id=schema.LOCAL_TENANT, name="Local user", email=None, created_at=datetime.now(UTC)
            )
        )
        return
    found = connection.execute(select(schema.schema_version.c.version)).scalar_one()
    while found in schema.STEPS:
        for statement in schema.STEPS[found]:
            connection.execute(text(statement))
        found += 1
    if found == schema.SCHEMA_VERSION:
        schema.metadata.create_all(connection)
        connection.execute(update(schema.schema_version).values(version=found))
    else:
        raise HostNotReady(
            f"{path} has schema version {found}, this program knows {schema.SCHEMA_VERSION}:"
            " run the version of instavm that wrote it, or move the file away to start afresh"
        )
