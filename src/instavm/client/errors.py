"""From an answer's status and `code` back to the exception: `control.api.errors` the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from pydantic import ValidationError

from instavm import errors
from instavm.wire.errors import Problem

BY_STATUS: Final[Mapping[int, type[errors.InstaVMError]]] = {
    400: errors.BadRequest,
    401: errors.AuthenticationError,
    403: errors.ForbiddenError,
    404: errors.SessionNotFound,
    409: errors.SessionError,
    410: errors.SessionEnded,
    413: errors.TooLarge,
    422: errors.InvalidInput,
    429: errors.RateLimitError,
    501: errors.UnsupportedOperationError,
    502: errors.NetworkError,
    503: errors.HostNotReady,
    504: errors.OutcomeUnknown,
    507: errors.DiskFull,
}
"""For servers that send no `code`."""


def tree(root: type[errors.InstaVMError] = errors.InstaVMError) -> Iterator[type[errors.InstaVMError]]:
    """Every class of ours, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def from_answer(status: int, body: bytes) -> errors.InstaVMError:
    """The exception that an answer stands for. Never raises: whatever came back, some error fits."""
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError:
        problem = Problem(detail=body[:500].decode("utf-8", "replace").strip() or "no detail was given", code="")
    kind = _by_code(problem.code) or BY_STATUS.get(status, errors.InstaVMError)
    if issubclass(kind, errors.InvalidInput):
        return _refused(kind, problem)
    return kind(_text(problem))


def _by_code(code: str) -> type[errors.InstaVMError] | None:
    known = {kind.code: kind for kind in tree() if kind is not errors.InstaVMError}
    return known.get(code)


def _refused(kind: type[errors.InvalidInput], problem: Problem) -> errors.InvalidInput:
    """The server's own words; the value itself is not sent back."""
    exc = kind(problem.field or "request", None, problem.allowed or _text(problem))
    exc.args = (_text(problem),)
    return exc


def _text(problem: Problem) -> str:
    if isinstance(problem.detail, str):
        return problem.detail
    return "; ".join(str(one.get("msg", one)) for one in problem.detail)
