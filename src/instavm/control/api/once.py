"""`Idempotency-Key`: a route that makes or runs something says what, and this sees to it that it is done once."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

from fastapi import Depends, Header, Request
from pydantic_core import to_json
from starlette.responses import Response

from instavm import limits
from instavm.control.api.here import caller_of, control_of
from instavm.control.api.long import Long
from instavm.control.control import Control
from instavm.control.store.accounts import Tenant
from instavm.errors import BadRequest
from instavm.wire.base import Wire

HEADER: Final = "Idempotency-Key"


class Begun(Wire):
    id: str


class Once:
    """One request: who asks, of which services, and its key, if it came with one."""

    def __init__(self, request: Request, caller: Tenant, here: Control, key: str | None) -> None:
        self._request = request
        self.caller = caller
        self.here = here
        self._key = key

    @property
    def repeatable(self) -> bool:
        """Whether the client may come back for the answer."""
        return self._key is not None

    async def create(self, work: Callable[[str | None], Awaitable[Wire]]) -> Response:
        """Make something, in the session whose id `work` is handed; None = in one of its own. Broken off, it is begun again."""
        return _json(await self._answer(work, again=True))

    async def run(self, work: Callable[[], Awaitable[Wire]]) -> Response:
        """Run something. Broken off by the end of the server, nobody knows how far it came, and it is not begun again."""
        return _json(await self._answer(lambda _target: work(), again=False))

    async def begin(self, work: Callable[[], str]) -> str:
        """Begin something that can be asked for by its id. Returns: that id."""

        async def begun(_target: str | None) -> Begun:
            return Begun(id=work())

        return Begun.model_validate_json(await self._answer(begun, again=False)).id

    async def _answer(self, work: Callable[[str | None], Awaitable[Wire]], *, again: bool) -> bytes:
        if self._key is None:
            return _bytes(await work(None))
        if not (0 < len(self._key) <= limits.IDEMPOTENCY_KEY_CHARS and self._key.isascii() and self._key.isprintable()):
            raise BadRequest(HEADER, self._key, limits.ALLOWED["idempotency-key"])

        async def begun(target: str) -> bytes:
            return _bytes(await work(target))

        fingerprint = await self._fingerprint()
        return await self.here.repeats.once(self.caller, self._key, fingerprint, begun, again=again)

    async def _fingerprint(self) -> str:
        url = self._request.url
        head = f"{self._request.method} {url.path}?{url.query}\n".encode()
        return hashlib.sha256(head + await self._request.body()).hexdigest()


def _bytes(answer: Wire) -> bytes:
    return to_json(answer)


def _json(body: bytes) -> Response:
    return Long(body, media_type="application/json")


async def _once(request: Request, key: Annotated[str | None, Header(alias=HEADER)] = None) -> Once:
    """A coroutine, as FastAPI would call anything else in a thread."""
    return Once(request, await caller_of(request), await control_of(request), key)


OnlyOnce = Annotated[Once, Depends(_once)]
"""Instead of `Caller` and `Here`, not beside them: FastAPI takes as long to hand over one of them as all of a route does."""
