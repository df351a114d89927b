"""An answer that may be long: sent no faster than it is taken, so that it does not lie in every buffer on the way."""

from __future__ import annotations

from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

PIECE_BYTES: Final = 256 << 10


class Long(Response):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_body(send, bytes(self.body))


async def send_body(send: Send, body: bytes) -> None:
    """What is left of an answer whose head was sent."""
    last = max(0, len(body) - PIECE_BYTES)
    for start in range(0, last, PIECE_BYTES):
        await send({"type": "http.response.body", "body": body[start : start + PIECE_BYTES], "more_body": True})
    rest = -(-last // PIECE_BYTES) * PIECE_BYTES
    await send({"type": "http.response.body", "body": body[rest:]})
