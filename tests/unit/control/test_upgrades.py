"""Databases of earlier versions: each is upgraded whole, whenever its upgrade is broken off."""

import os
import signal
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import event

from instavm.control.accounts import LocalAccounts
from instavm.control.store import schema
from instavm.control.store.database import open_accounts, open_store
from instavm.control.store.engine import Engine
from instavm.control.store.upgrade import prepare
from instavm.errors import HostNotReady

OLD = {int(file.stem.removeprefix("version")): file for file in (Path(__file__).parent / "schemas").glob("*.sql")}
SESSION = "3f0f7c7e-0000-4000-8000-000000000001"
FAILED = 2
STATEMENTS_MAX = 500


@pytest.fixture
def anyio_backend():
    return "asyncio"


def made(path, version):
    """A database as that version of the program left it; None: none at all."""
    if version is not None:
        with sqlite3.connect(path) as connection:
            connection.executescript(OLD[version].read_text())
        connection.close()
    return path


def shape(path):
    """Tables with their columns, and indexes with theirs."""
    connection = sqlite3.connect(path)
    names = connection.execute("SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
    pragma = {"table": "table_info", "index": "index_info"}
    column = {"table": 1, "index": 2}
    found = {
        (kind, name): {row[column[kind]] for row in connection.execute(f"PRAGMA {pragma[kind]}({name})")}
        for kind, name in names
    }
    connection.close()
    return found


def upgraded(path):
    engine = Engine(path)
    try:
        engine.transact(lambda connection: prepare(connection, path), exclusive=True)
    finally:
        engine._engine.dispose()


def killed_before(path, statement):
    """Upgrade in a process that is killed before its n-th statement. Returns: whether it lived to the end."""
    pid = os.fork()
    if pid == 0:
        status = FAILED
        try:
            seen = 0

            def count(*_):
                nonlocal seen
                seen += 1
                if seen == statement:
                    os.kill(os.getpid(), signal.SIGKILL)

            engine = Engine(path)
            event.listen(engine._engine, "before_cursor_execute", count)
            engine.transact(lambda connection: prepare(connection, path), exclusive=True)
            status = 0
        finally:
            os._exit(status)
    _, how = os.waitpid(pid, 0)
    assert how in (0, signal.SIGKILL)
    return how == 0


def version_of(path):
    connection = sqlite3.connect(path)
    (found,) = connection.execute("SELECT version FROM schema_version").fetchone()
    connection.close()
    return found


def test_there_is_a_database_of_every_earlier_version():
    assert set(OLD) == set(range(1, schema.SCHEMA_VERSION)) == set(schema.STEPS)


@pytest.mark.parametrize("version", [None, *OLD])
def test_an_upgrade_killed_before_any_of_its_statements_is_done_by_the_next_start(tmp_path, version):
    fresh = made(tmp_path / "fresh", None)
    upgraded(fresh)
    for statement in range(1, STATEMENTS_MAX):
        path = made(tmp_path / f"killed-{statement}", version)
        before = shape(path) if version is not None else {}
        whole = killed_before(path, statement)
        assert shape(path) == (shape(fresh) if whole else before), f"half an upgrade after statement {statement}"
        upgraded(path)
        assert (shape(path), version_of(path)) == (shape(fresh), schema.SCHEMA_VERSION)
        if whole:
            break
    assert whole and statement > 5


@pytest.mark.parametrize("version", [version for version in OLD if schema.STEPS[version]])
def test_a_database_that_an_earlier_release_left_half_upgraded_is_upgraded(tmp_path, version):
    """Earlier releases committed each column by itself."""
    fresh = made(tmp_path / "fresh", None)
    upgraded(fresh)
    columns = schema.STEPS[version]
    for done in range(1, len(columns) + 1):
        path = made(tmp_path / f"half-{done}", version)
        with sqlite3.connect(path) as connection:
            for one in columns[:done]:
                connection.execute(f"ALTER TABLE {one.table} ADD COLUMN {one.name} {one.kind}")
        connection.close()
        upgraded(path)
        assert (shape(path), version_of(path)) == (shape(fresh), schema.SCHEMA_VERSION)


def test_a_database_that_an_earlier_release_only_began_to_make_is_made(tmp_path):
    """It had tables, and nothing in them: not even its version."""
    path = made(tmp_path / "db", 1)
    with sqlite3.connect(path) as connection:
        for table in ("events", "vms", "sessions", "api_keys", "tenants", "schema_version"):
            connection.execute(f"DELETE FROM {table}")
        connection.execute("DROP TABLE events")
    connection.close()
    upgraded(path)
    assert version_of(path) == schema.SCHEMA_VERSION


@pytest.mark.anyio
@pytest.mark.parametrize("version", OLD)
async def test_what_an_old_database_holds_is_there_after_the_upgrade(tmp_path, version):
    async with open_store(made(tmp_path / "db", version)) as store:
        session, vm = await store.sessions.load("team", SESSION)
        assert (session.metadata, session.env_keys, vm.id) == ({"app": "demo"}, ("A",), "vm-aaaaaaaaaa")
        assert [key.description for key in await store.accounts.keys("team")] == ["CI"]
        assert (await LocalAccounts(store.accounts).tenant_of("any")).id == "local"
        tasks = await store.tasks.of_tenant("team", 10)
        assert [task.stdout for task in tasks] == (["hello\n"] if version > 1 else [])


@pytest.mark.anyio
async def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    path = made(tmp_path / "db", 6)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schema_version SET version = 1000")
    connection.close()
    before = shape(path)
    with pytest.raises(HostNotReady, match="1000"):
        async with open_accounts(path):
            pass
    assert shape(path) == before
