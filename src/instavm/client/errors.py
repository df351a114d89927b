"""From an answer's status and `code` back to the exception: `control.api.errors` the other way round."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
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


NO_ROUTE: Final = "not_found"
"""The `code` of a server of ours for an address that it does not have."""
PAGE_BYTES: Final = 64 << 10
"""How much of a page that is no answer of ours is looked through for its words."""
TOLD_CHARS: Final = 300


def tree(root: type[errors.InstaVMError] = errors.InstaVMError) -> Iterator[type[errors.InstaVMError]]:
    """Every class of ours, parents first."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def from_answer(
    status: int, body: bytes, headers: Mapping[str, str] | None = None, base_url: str | None = None
) -> errors.InstaVMError:
    """The exception that an answer stands for. Never raises: whatever came back, some error fits.

    headers: of the answer. base_url: what was asked, for the words about an address that is wrong.
    """
    headers = headers or {}
    if 300 <= status < 400:
        return _redirected(status, headers, base_url)
    try:
        problem = Problem.model_validate_json(body)
    except ValidationError:
        return _foreign(status, body, base_url)
    if (status, problem.code) == (404, NO_ROUTE):
        return errors.NetworkError(f"the server at {base_url} has no such address (404 Not Found){_hint(base_url)}")
    kind = _by_code(problem.code) or BY_STATUS.get(status, errors.InstaVMError)
    if issubclass(kind, errors.InvalidInput):
        return _refused(kind, problem)
    if issubclass(kind, errors.RateLimitError):
        return kind(_text(problem), retry_after_s(headers.get("retry-after")))
    return kind(_text(problem))


def retry_after_s(header: str | None) -> float | None:
    """Seconds from a `Retry-After`, which is a number of them or a date; None when it tells nothing."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None


def _redirected(status: int, headers: Mapping[str, str], base_url: str | None) -> errors.InstaVMError:
    where = headers.get("location") or "an address that it does not name"
    return errors.NetworkError(
        f"base_url {base_url} redirects to {where} ({status}), and redirects are not followed: give the address itself"
    )


def _foreign(status: int, body: bytes, base_url: str | None) -> errors.InstaVMError:
    """What is no answer of this server's: a proxy's, another server's, or nothing."""
    said = _words(body[:PAGE_BYTES].decode("utf-8", "replace"))
    text = f"{status} {_phrase(status)}: {said or 'no detail was given'}"
    if status == HTTPStatus.NOT_FOUND:
        return errors.NetworkError(f"{base_url} has no such address ({text}){_hint(base_url)}")
    kind = BY_STATUS.get(status, errors.InstaVMError)
    if issubclass(kind, errors.InvalidInput):
        return _refused(kind, Problem(detail=text, code=""))
    return kind(text)


def _words(page: str) -> str:
    """What a page says, without its markup: the title, or the beginning of the text."""
    if "<" in page:
        title = re.search(r"<title[^>]*>(.*?)</title", page, re.IGNORECASE | re.DOTALL)
        hidden = re.sub(r"<(script|style)\b.*?(</\1\s*>|$)|<!--.*?(-->|$)", " ", page, flags=re.IGNORECASE | re.DOTALL)
        page = html.unescape(title.group(1) if title else re.sub(r"<[^>]*(>|$)", " ", hidden))
    return " ".join(page.split())[:TOLD_CHARS]


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "(not a status of HTTP)"


def _hint(base_url: str | None) -> str:
    if base_url is not None and re.search(r"/v\d+$", base_url):
        return f": the client adds {base_url[base_url.rindex('/') :]} by itself, so give base_url without it"
    return ": does base_url point at an InstaVM server?"


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
