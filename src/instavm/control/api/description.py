"""What the OpenAPI document says besides the routes: errors, credentials, names of operations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.responses import StreamingResponse

from instavm.control.api.errors import STATUS
from instavm.wire.errors import Problem

Responses = dict[int | str, dict[str, Any]]

OPEN: Final = frozenset({"/health"})
"""Paths that need no key."""
TAGS: Final[Mapping[str, str]] = {
    "executions": "Run code and wait for its result.",
    "sessions": "A session is a durable handle for work in one sandbox at a time.",
    "tasks": "Run code without waiting, and ask for its result later.",
    "files": "Bring files into a sandbox and out of it.",
    "streams": "Run code and follow its output as server-sent events.",
    "processes": "Programs that run in the background of a sandbox.",
    "vms": "The sandboxes of sessions, by their own ids.",
    "snapshots": "Disks that sandboxes can be started from.",
    "egress": "What sandboxes may reach in the network, and what they reached.",
    "server": "The server itself.",
    "account": "The account that a key belongs to.",
    "keys": "API keys of the account.",
}
_KEYS: Final = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "The API key as a bearer token."},
}


def _codes() -> dict[int, str]:
    codes: dict[int, list[str]] = defaultdict(list)
    for error, status in STATUS.items():
        codes[status].append(error.code)
    return {status: ", ".join(f"`{code}`" for code in found) for status, found in codes.items()}


_CODES: Final = _codes()


def problems(*statuses: int) -> Responses:
    """For a route's `responses`: it may answer with these statuses, each with a `Problem`."""
    return {
        status: {"model": Problem, "description": f"{HTTPStatus(status).phrase}. `code` is one of {_CODES[status]}."}
        for status in sorted(statuses)
    }


EVERYWHERE: Final = problems(400, 401, 413, 422, 429, 500, 503, 504)
"""Every operation that needs a key: the request is refused, or the server can't answer."""
IN_SANDBOX: Final = problems(403, 404, 409, 410, 501, 502, 507)
"""An operation that needs the session's sandbox, and starts one when there is none."""


class EventStream(StreamingResponse):
    """Server-sent events."""

    media_type = "text/event-stream"


def operation_id(route: APIRoute) -> str:
    """Tag and function, such as `sessions_create`: stays the same when a path changes."""
    return f"{route.tags[0]}_{route.name}"


def describe(app: FastAPI) -> None:
    """Complete the document that FastAPI makes of the routes."""
    made = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
            document["components"]["securitySchemes"] = _KEYS
            document["security"] = [{name: []} for name in _KEYS]
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    _correct(operation)
                    if path in OPEN:
                        operation["security"] = []
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = complete  # type: ignore[method-assign]


def _correct(operation: dict[str, Any]) -> None:
    """Errors are JSON, also where the result is something else; FastAPI gives them the type of the result."""
    for status, told in operation["responses"].items():
        if not status.startswith("2"):
            (schema,) = (kind["schema"] for kind in told["content"].values())
            told["content"] = {"application/json": {"schema": schema}}
