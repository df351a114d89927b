"""The tables. Times are UTC text; values of environment variables have no column anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    JSON,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    TypeDecorator,
)

SCHEMA_VERSION: Final = 7
"""Raise it with every change below, and add the step that gets there."""
LOCAL_TENANT: Final = "local"
"""Owns everything that comes in through a private socket, and keys made without naming a tenant."""

metadata = MetaData()


class Utc(TypeDecorator[datetime]):
    """A UTC datetime as sortable text."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

tenants = Table(
    "tenants",
    metadata,
    Column("id", String, primary_key=True),
    Column("name", String, nullable=False),
    Column("email", String),
    Column("created_at", Utc, nullable=False),
    Column("max_sandboxes", Integer),
    Column("max_vcpus", Integer),
    Column("max_memory_mib", Integer),
    Column("max_lifetime_s", Integer),
    Column("max_disk_mib", Integer),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("hash", String, nullable=False, unique=True),
    Column("hint", String, nullable=False),
    Column("description", String, nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("revoked_at", Utc),
    Column("last_used_at", Utc),
    sqlite_autoincrement=True,
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("closed_at", Utc),
    Column("lifetime_s", Integer, nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("image", String, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("options", JSON, nullable=False, server_default="{}"),
    Column("env_keys", JSON, nullable=False),
    Column("execution_count", Integer, nullable=False, default=0),
    Column("execution_time_s", Float, nullable=False, default=0.0),
    Column("cpu_time_s", Float, nullable=False, default=0.0),
    Column("vm_seconds", Float, nullable=False, default=0.0),
    Index("sessions_of_tenant", "tenant_id", "created_at"),
)

vms = Table(
    "vms",
    metadata,
    Column("id", String, primary_key=True),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("state", String, nullable=False),
    Column("why", String),
    Column("created_at", Utc, nullable=False),
    Column("started_at", Utc),
    Column("expires_at", Utc),
    Column("ended_at", Utc),
    Column("start", JSON),
    Column("detail", String),
    Column("console", String),
    Index("vms_of_session", "session_id", "created_at"),
    Index("vms_by_state", "state"),
)

events = Table(
    "events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("at", Utc, nullable=False),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("vm_id", ForeignKey("vms.id")),
    Column("event", String, nullable=False),
    Column("reason", String),
    Column("detail", String),
    Index("events_of_session", "session_id", "seq"),
    sqlite_autoincrement=True,
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("session_id", ForeignKey("sessions.id"), nullable=False),
    Column("vm_id", ForeignKey("vms.id")),
    Column("language", String, nullable=False),
    Column("status", String, nullable=False),
    Column("reason", String),
    Column("created_at", Utc, nullable=False),
    Column("finished_at", Utc),
    Column("exit_code", Integer),
    Column("stdout", String, nullable=False, default=""),
    Column("stderr", String, nullable=False, default=""),
    Column("truncated", Integer, nullable=False, default=0),
    Column("execution_time_s", Float),
    Column("cpu_time_s", Float),
    Column("command", String),
    Column("timeout_s", Float),
    Index("tasks_of_tenant", "tenant_id", "created_at"),
    Index("tasks_by_status", "status"),
)

repeats = Table(
    "repeats",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id"), primary_key=True),
    Column("key", String, primary_key=True),
    Column("fingerprint", String, nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("target", String, nullable=False),
    Column("answer", LargeBinary),
    Index("repeats_by_age", "created_at"),
)

egress = Table(
    "egress",
    metadata,
    Column("target", String, primary_key=True),
    Column("policy", JSON, nullable=False),
    Column("changed_at", Utc, nullable=False),
)

egress_logs = Table(
    "egress_logs",
    metadata,
    Column("vm_id", ForeignKey("vms.id"), primary_key=True),
    Column("log", JSON, nullable=False),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id"), nullable=False),
    Column("name", String),
    Column("type", String, nullable=False),
    Column("status", String, nullable=False),
    Column("created_at", Utc, nullable=False),
    Column("finished_at", Utc),
    Column("vm_id", String),
    Column("oci_image", String),
    Column("digest", String),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("size_bytes", Integer, nullable=False, default=0),
    Column("build_args", JSON, nullable=False, server_default="{}"),
    Column("labels", JSON, nullable=False, server_default="{}"),
    Column("log", String, nullable=False, default=""),
    Column("last_error", String),
    Index("snapshots_of_tenant", "tenant_id", "created_at"),
)


class AddColumn(NamedTuple):
    """A column that a newer version has. `kind`: its type and constraints, as SQL."""

    table: str
    name: str
    kind: str


STEPS: Final[Mapping[int, tuple[AddColumn, ...]]] = {
    1: (
        AddColumn("tenants", "max_sandboxes", "INTEGER"),
        AddColumn("tenants", "max_vcpus", "INTEGER"),
        AddColumn("tenants", "max_memory_mib", "INTEGER"),
        AddColumn("tenants", "max_lifetime_s", "INTEGER"),
        AddColumn("api_keys", "last_used_at", "VARCHAR"),
        AddColumn("sessions", "options", "JSON NOT NULL DEFAULT '{}'"),
    ),
    2: (),
    3: (AddColumn("tenants", "max_disk_mib", "INTEGER"),),
    4: (),
    5: (
        AddColumn("tasks", "command", "VARCHAR"),
        AddColumn("tasks", "timeout_s", "FLOAT"),
    ),
    6: (
        AddColumn("vms", "detail", "VARCHAR"),
        AddColumn("vms", "console", "VARCHAR"),
    ),
}
"""Version → the columns that the next one adds. Tables that are new in it are made from their description above."""
