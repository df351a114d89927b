"""Sessions over the wire: create, record, status, usage, sandboxes, kill."""

from __future__ import annotations

import json
from typing import Annotated, Any
from uuid import UUID

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from instavm import limits
from instavm.contract.isolation import Tier
from instavm.wire.base import Asked, Timestamp, Wire
from instavm.wire.egress import EgressPolicy, SetEgress
from instavm.wire.env import Env


def or_(default: Any) -> BeforeValidator:
    """`null` on the wire means the same as leaving the field out."""
    return BeforeValidator(lambda value: default if value is None else value)


def _bounded(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(metadata, separators=(",", ":"), allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError):
        raise ValueError("JSON cannot hold it") from None
    if size > limits.METADATA_BYTES:
        raise ValueError(f"longer than {limits.METADATA_BYTES} bytes")
    return metadata


Vcpus = Annotated[int, or_(limits.VCPUS_DEFAULT), Field(strict=True, ge=limits.VCPUS_MIN, le=limits.VCPUS_MAX)]
Memory = Annotated[int, Field(strict=True, ge=limits.MEMORY_MIB_MIN, le=limits.MEMORY_MIB_MAX)]
MemoryMib = Annotated[Memory, or_(limits.MEMORY_MIB_DEFAULT)]
LifetimeS = Annotated[
    int,
    or_(limits.LIFETIME_S_DEFAULT),
    Field(strict=True, ge=limits.LIFETIME_S_MIN, le=limits.LIFETIME_S_MAX),
]
Metadata = Annotated[dict[str, Any], or_({}), AfterValidator(_bounded)]


RequireIsolation = Tier | None
"""The weakest tier that will do: a host that has only less refuses, and nothing is started."""


class CreateSession(Asked):
    """`POST /v1/sessions/session`. `env` values are never stored, answered or logged."""

    api_key: SecretStr | None = None
    vm_lifetime_seconds: LifetimeS = limits.LIFETIME_S_DEFAULT
    vcpu_count: Vcpus = limits.VCPUS_DEFAULT
    memory_mb: MemoryMib = limits.MEMORY_MIB_DEFAULT
    metadata: Metadata = Field(default_factory=dict)
    env: Env = Field(default_factory=dict, repr=False)
    egress_policy: SetEgress | None = None
    require_isolation: RequireIsolation = None


class Filter(Wire):
    """What sandboxes are looked for by: those whose metadata contains all of these pairs."""

    metadata: Metadata


class Start(Wire):
    """How the sandbox came up: told in the session's record, and once with its first result."""

    vm_id: str
    driver: str
    tier: Tier
    cold: bool
    """True when this size was asked for the first time, so that its template had to be made."""
    steps_ms: dict[str, float]
    """Milliseconds per step, in order; they add up to the whole."""


class Session(Wire):
    """A session's record. `vm_id`, `expires_at` and `start` belong to its latest sandbox."""

    session_id: UUID
    status: str
    reason: str | None = None
    """Why the latest sandbox ended: killed, lifetime, boot_failed, crashed, over_limit, node_lost, server_stopped."""
    error: str | None = None
    """The same as a sentence, if nobody asked it to end."""
    vm_id: str | None = None
    created_at: Timestamp
    expires_at: Timestamp | None = None
    vm_lifetime_seconds: int
    vcpu_count: int
    memory_mb: int
    metadata: dict[str, Any]
    env_keys: list[str] = Field(default_factory=list)
    egress_policy: EgressPolicy
    start: Start | None = None


class SessionStatus(Wire):
    """Liveness, with exactly these fields. `vm_status` is `active` for a live sandbox and for no other."""

    session_id: UUID
    exists: bool
    vm_assigned: bool
    vm_alive: bool
    vm_status: str | None
    vm_id: str | None
    uptime_seconds: float | None
    expires_in_seconds: float | None
    created_at: Timestamp


class SessionUsage(Wire):
    """Times are seconds. `vm_seconds` counts every sandbox that the session has had."""

    session_id: UUID
    execution_count: int
    total_execution_time: float
    cpu_time: float
    vm_seconds: float
    memory_mb: int
    vcpu_count: int


class Sandbox(Wire):
    """One live sandbox in `GET /v1/sessions/sandboxes`. `end_at` is when its lifetime runs out."""

    sandbox_id: str
    session_id: UUID
    template_id: str | None = None
    name: str
    metadata: dict[str, Any]
    started_at: Timestamp
    end_at: Timestamp | None
    status: str


class AppUrl(Wire):
    """Where a web server inside a sandbox is reached; no server answers with it yet, it is 501 so far.

    `app_url` is `url`, under a name that other clients read.
    """

    url: str
    app_url: str
    direct_url: str
    vm_ip: str
    port: int
    vm_id: str
    session_id: UUID
    status: str
    expires_in_seconds: int | None


class Kill(Asked):
    """`POST /kill`."""

    session_id: str
    api_key: SecretStr | None = None


class Killed(Wire):
    status: str = "killed"
    vm_id: str | None
    session_id: UUID
