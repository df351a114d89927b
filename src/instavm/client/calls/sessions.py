"""Calls about sessions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from instavm import limits
from instavm.client.calls.base import Call, ask, reading, segment
from instavm.client.results import AppUrl, Record, Sandbox, SessionInfo, SessionStatus, SessionUsage
from instavm.errors import InvalidInput, NetworkError
from instavm.wire import sessions as wire
from instavm.wire.base import Wire

R = TypeVar("R", bound=Record)

ARGUMENTS = {"vcpu_count": "cpu_count", "vm_lifetime_seconds": "timeout"}
"""Wire field → the argument that the caller of the SDK gave."""

_SANDBOXES = TypeAdapter(list[wire.Sandbox])


def wanted(
    *,
    lifetime_s: float,
    cpu_count: int | None,
    memory_mb: int | None,
    env: Mapping[str, Any] | None,
    metadata: Mapping[str, Any] | None,
    require_isolation: str | None = None,
) -> wire.CreateSession:
    """Raises: InvalidInput, for a size, a lifetime, an environment or metadata that no server would take."""
    return ask(
        wire.CreateSession,
        ARGUMENTS,
        vm_lifetime_seconds=lifetime_s,
        vcpu_count=cpu_count,
        memory_mb=memory_mb,
        env=env,
        metadata=metadata,
        require_isolation=require_isolation,
    )


def create(api_key: str, given: wire.CreateSession) -> Call[str]:
    """Make a session; its sandbox begins to boot. The answer is its id, and comes before the boot is done.

    Repeatable: a session whose id got lost ends with its lifetime.
    """
    body = given.model_dump(mode="json", exclude_unset=True, exclude={"api_key"}) | {"api_key": api_key}
    read = reading(wire.Session)
    return Call("POST", "/v1/sessions/session", lambda raw: str(read(raw).session_id), _json(body))


def info(session_id: str) -> Call[SessionInfo]:
    return _about("session", session_id, wire.Session, SessionInfo)


def status(session_id: str) -> Call[SessionStatus]:
    return _about("status", session_id, wire.SessionStatus, SessionStatus)


def usage(session_id: str) -> Call[SessionUsage]:
    return _about("usage", session_id, wire.SessionUsage, SessionUsage)


def app_url(session_id: str, port: int) -> Call[AppUrl]:
    if isinstance(port, bool) or not isinstance(port, int) or not 1 <= port <= 65535:
        raise InvalidInput("port", port, limits.ALLOWED["port"])
    read = reading(wire.AppUrl)
    path = f"/v1/sessions/app-url/{segment(session_id=session_id)}"
    return Call("GET", path, lambda raw: AppUrl(read(raw).model_dump(mode="json")), params={"port": str(port)})


def sandboxes(metadata: Mapping[str, Any] | None, limit: int) -> Call[list[Sandbox]]:
    """Raises: InvalidInput, for a limit that is out of range."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= limits.LIST_LIMIT_MAX:
        raise InvalidInput("limit", limit, limits.ALLOWED["limit"])
    params = {"limit": str(limit)}
    if metadata:
        params["metadata"] = json.dumps(ask(wire.Filter, metadata=metadata).metadata, separators=(",", ":"))
    return Call("GET", "/v1/sessions/sandboxes", _read_sandboxes, params=params)


def kill(session_id: str) -> Call[None]:
    return Call("POST", "/kill", lambda _raw: None, _json({"session_id": session_id}))


def _about(what: str, session_id: str, model: type[Wire], result: type[R]) -> Call[R]:
    read = reading(model)
    path = f"/v1/sessions/{what}/{segment(session_id=session_id)}"
    return Call("GET", path, lambda raw: result(read(raw).model_dump(mode="json")))


def _read_sandboxes(raw: bytes) -> list[Sandbox]:
    try:
        return [Sandbox(one.model_dump(mode="json")) for one in _SANDBOXES.validate_json(raw)]
    except ValidationError:
        raise NetworkError("the server's answer is not a list of sandboxes") from None


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()
