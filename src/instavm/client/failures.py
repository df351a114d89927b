"""What goes wrong between a call and its answer: errors of libraries as ours, and whether a call may be repeated."""

from __future__ import annotations

from typing import Any, Final

import httpx

from instavm.client.calls.base import Call
from instavm.errors import InstaVMError, NetworkError, ServerStopping

TROUBLE: Final = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError)
"""All that sending a request and reading its answer may raise besides errors of ours."""


def repeatable(exc: BaseException, call: Call[Any]) -> bool:
    """Only what never went out or was not begun, or does no harm when it is done twice."""
    not_begun = isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | ServerStopping)
    return not_begun or (call.repeatable and isinstance(exc, httpx.TransportError))


def translated(exc: Exception, call: Call[Any]) -> InstaVMError:
    """One of TROUBLE, as the error that its caller gets."""
    what = f"{call.method} {call.path}"
    why = str(exc) or type(exc).__name__
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout | httpx.InvalidURL | UnicodeError):
        return NetworkError(f"{what}: the server cannot be reached ({why})")
    if isinstance(exc, httpx.TimeoutException):
        return NetworkError(f"{what}: no answer within {call.answer_s:g} s")
    if isinstance(exc, httpx.DecodingError):
        return NetworkError(f"{what}: the answer cannot be decoded ({why})")
    return NetworkError(f"{what}: the connection broke before the answer was there ({why})")
