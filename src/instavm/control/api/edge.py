"""What is done to every request before a route sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instavm import limits
from instavm.control.api.errors import answer, bug
from instavm.control.api.here import ENDING
from instavm.errors import TooLarge

UNBOUNDED: Final = frozenset({"/upload"})
"""Paths whose body is a file, which is passed on while it arrives."""
_LENGTH: Final = b"content-length"


class Edge:
    """Takes `//execute` for `/execute` (base URLs with a slash at the end are common), bounds the body, and ends the request.

    What nobody foresaw is answered here: Starlette would answer and then hang up without a word.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("//"):
            scope["path"] = "/" + scope["path"].lstrip("/")
        endings: list[Callable[[], None]] = []
        scope[ENDING] = endings
        begun = False

        async def note(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._bounded(scope, receive, note)
        except Exception as exc:
            if begun:  # what is left of the answer never comes, which the client sees by its end
                raise
            await bug(scope["method"], scope["path"], exc)(scope, receive, send)
        finally:
            for end in endings:
                end()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in UNBOUNDED:
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in scope["headers"] if name == _LENGTH), b"0")
        if length.isdigit() and int(length) > limits.BODY_BYTES:
            await answer(_too_large(int(length)))(scope, receive, send)
            return
        await self._app(scope, _bounded(receive), send)


def _bounded(receive: Receive) -> Receive:
    """Counts what really arrives: a length need not be told, and need not be true."""
    seen = 0

    async def read() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limits.BODY_BYTES:
            raise _too_large(seen)
        return message

    return read


def _too_large(size: int) -> TooLarge:
    return TooLarge("body", f"{size} bytes", limits.ALLOWED["body"])
