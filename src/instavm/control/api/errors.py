"""The only place that knows our errors and HTTP. `client.errors` is the same table the other way round."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from instavm import errors
from instavm.wire.errors import Problem
from instavm.wire.text import shown
from instavm.wire.validation import HIDDEN, refusal

log = logging.getLogger(__name__)

STATUS: Final[Mapping[type[errors.InstaVMError], int]] = {
    errors.InvalidInput: 422,
    errors.BadRequest: 400,
    errors.TooLarge: 413,
    errors.AuthenticationError: 401,
    errors.ForbiddenError: 403,
    errors.SessionError: 409,
    errors.SessionNotFound: 404,
    errors.SessionEnded: 410,
    errors.SnapshotError: 409,
    errors.ExecutionError: 409,
    errors.OutcomeUnknown: 504,
    errors.FileError: 400,
    errors.FileMissing: 404,
    errors.ProcessError: 409,
    errors.ProcessNotFound: 404,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.RateLimitError: 429,
    errors.HostNotReady: 503,
    errors.BootFailed: 503,
    errors.DiskFull: 507,
    errors.GuestProtocolError: 502,
    errors.NetworkError: 502,
    errors.UnsupportedOperationError: 501,
    errors.InstaVMError: 500,
}
RETRY_AFTER_S: Final = 5
"""Told with a 429 that knows no better: sandboxes come and go within seconds."""


def status_of(exc: errors.InstaVMError) -> int:
    return next(STATUS[c] for c in type(exc).__mro__ if c in STATUS)


def answer(exc: errors.InstaVMError) -> Response:
    """The whole answer for one of our errors."""
    status = status_of(exc)
    field, allowed, detail = None, None, shown(str(exc))
    if isinstance(exc, errors.InvalidInput):
        field, allowed = exc.field, exc.allowed
    listed = [{"loc": ["body", field], "msg": detail, "type": exc.code}] if status == 422 else detail
    problem = Problem(detail=listed, code=exc.code, field=field, allowed=allowed, retry_after_s=_retry_after_s(exc))
    return _reply(status, problem, _headers(exc))


def problem(exc: errors.InstaVMError) -> Problem:
    """What is told of one of our errors where there is no status to tell it with."""
    return Problem(detail=shown(str(exc)), code=exc.code, retry_after_s=_retry_after_s(exc))


def _retry_after_s(exc: errors.InstaVMError) -> float | None:
    return exc.retry_after_s if isinstance(exc, errors.RateLimitError) else None


def _headers(exc: errors.InstaVMError) -> Mapping[str, str] | None:
    if isinstance(exc, errors.RateLimitError):
        return {"Retry-After": str(_wait_s(exc))}
    return {"Connection": "close"} if isinstance(exc, errors.ServerStopping) else None


def _wait_s(exc: errors.RateLimitError) -> int:
    return RETRY_AFTER_S if exc.retry_after_s is None else max(1, math.ceil(exc.retry_after_s))


def _reply(status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status, headers=headers, media_type="application/json")


async def _known(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, errors.InstaVMError)
    if status_of(exc) >= 500:
        log.warning("%s: %s", exc.code, exc)
    return answer(exc)


async def _refused(_request: Request, exc: Exception) -> Response:
    """What pydantic found, in the shape that FastAPI's clients expect, and the first one in our words too."""
    assert isinstance(exc, RequestValidationError)
    found = exc.errors()
    first = refusal(found)
    if status_of(first) != 422:
        return answer(first)
    detail = [_finding(one) for one in found]
    return _reply(422, Problem(detail=detail, code=first.code, field=first.field, allowed=first.allowed))


def _finding(found: Mapping[str, Any]) -> dict[str, Any]:
    """One finding without the value that was refused: it may be a secret, or very long."""
    loc = [part if isinstance(part, int) else str(part) for part in found["loc"]]
    hidden = HIDDEN & set(map(str, loc))
    msg = str(refusal([found])) if hidden or found["type"] == "value_error" else str(found["msg"])
    return {"loc": loc, "msg": msg, "type": str(found["type"])}


async def _http(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    if isinstance(exc.__cause__, errors.InstaVMError):  # raised while the body was read
        return answer(exc.__cause__)
    code = HTTPStatus(exc.status_code).phrase.lower().replace(" ", "_")
    return _reply(exc.status_code, Problem(detail=str(exc.detail), code=code), exc.headers)


def bug(method: str, path: str, exc: Exception) -> Response:
    """The answer for an error that nobody foresaw, which is logged."""
    log.error("%s %s failed", method, path, exc_info=exc)
    return _reply(500, Problem(detail="internal error", code="internal"))


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.InstaVMError, _known)
    app.add_exception_handler(RequestValidationError, _refused)
    app.add_exception_handler(HTTPException, _http)
