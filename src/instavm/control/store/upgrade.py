"""Bring a database to the current schema: make the tables of a new one, upgrade those of an older version.

All of it is one transaction, so a server that is killed half-way leaves the database as it was. Each step looks before it
changes anything, so a database that an earlier release left half upgraded is upgraded as well.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.engine import Connection

from instavm.control.store import schema
from instavm.errors import HostNotReady


def prepare(connection: Connection, path: Path) -> None:
    """Must run inside one transaction that covers DDL too: see `engine.Engine`.

    path: for the message only. Raises: HostNotReady, when a newer version wrote it.
    """
    made_before = inspect(connection).has_table("schema_version")
    version = connection.execute(select(schema.schema_version.c.version)).scalar_one_or_none() if made_before else None
    if version is not None and version > schema.SCHEMA_VERSION:
        raise HostNotReady(
            f"{path} has schema version {version}, this program knows {schema.SCHEMA_VERSION}:"
            " run the version of instavm that wrote it, or move the file away to start afresh"
        )
    schema.metadata.create_all(connection)
    if (
        version is None
    ):  # new, or an earlier release was killed before it wrote the version: then there is no row at all
        _add_columns(connection, since=min(schema.STEPS))
        connection.execute(insert(schema.schema_version).values(version=schema.SCHEMA_VERSION))
        _add_local_tenant(connection)
    elif version < schema.SCHEMA_VERSION:
        _add_columns(connection, since=version)
        connection.execute(update(schema.schema_version).values(version=schema.SCHEMA_VERSION))


def _add_columns(connection: Connection, since: int) -> None:
    for version in range(since, schema.SCHEMA_VERSION):
        for column in schema.STEPS[version]:
            there = {one["name"] for one in inspect(connection).get_columns(column.table)}
            if column.name not in there:
                connection.execute(text(f"ALTER TABLE {column.table} ADD COLUMN {column.name} {column.kind}"))


def _add_local_tenant(connection: Connection) -> None:
    connection.execute(
        insert(schema.tenants).values(
            id=schema.LOCAL_TENANT, name="Local user", email=None, created_at=datetime.now(UTC)
        )
    )
