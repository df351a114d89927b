"""An answer that may take as long as the client waits: it begins in time, and is kept alive until the result is there.

Clients of the hosted service use one number for the time that code may take and for the silence they bear. An answer that
came exactly when the code was stopped would lose that race. So the head of the answer goes out before, and single spaces
after it, which JSON allows; the price is that the status is 200 by then, whatever comes. Source: spec/api.md 0.5.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from instavm.control.api.long import send_body
from instavm.errors import InstaVMError
from instavm.wire.executions import MaybeLate

log = logging.getLogger(__name__)

SILENCE_S: Final = 10.0
"""Longest gap between two bytes, and at most half of what the client bears."""
BEGIN_S: Final = 30.0
"""Latest begin of an answer: what stands between may give up on a silent connection, too."""
LEAD_S: Final = 2.0


class Patient(Response):
    """The answer of `work`, which runs while this is being sent.

    patience_s: how long the client bears silence, in seconds.
    """

    def __init__(self, work: Callable[[], Awaitable[Response]], patience_s: float) -> None:
        super().__init__()
        self._work = work
        self._begin_s = min(BEGIN_S, max(patience_s / 2, patience_s - LEAD_S))
        self._gap_s = min(SILENCE_S, patience_s / 2)
        self._answer: Response | None = None
        self._error: Exception | None = None
        self._done = anyio.Event()
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks:
            begin = asyncio.get_running_loop().call_later(self._begin_s, tasks.start_soon, self._keep_alive, send)
            try:
                self._answer = await self._work()
            except Exception as exc:  # raised to who serves us, or told in the answer's body
                self._error = exc
            finally:
                begin.cancel()
                self._done.set()
        if self._begun:
            return
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        await self._answer(scope, receive, send)

    async def _keep_alive(self, send: Send) -> None:
        self._begun = True
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not self._done.is_set():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            with anyio.move_on_after(self._gap_s):
                await self._done.wait()
        body = _late(self._error) if self._answer is None else bytes(self._answer.body)
        await send_body(send, body)


def _late(error: Exception | None) -> bytes:
    """An error for which there is no status any more: a result that says so, with the error's code beside it."""
    if not isinstance(error, InstaVMError):
        log.error("an execution failed in a way that nobody foresaw", exc_info=error)
        error = InstaVMError("internal error")
    late = MaybeLate(code=error.code, detail=str(error), stdout="", stderr=f"[instavm] {error}\n", reason="vm_lost")
    return late.model_dump_json().encode()
