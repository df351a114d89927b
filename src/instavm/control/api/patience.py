"""An answer that may take as long as the client waits: it begins in time, and is kept alive until the result is there.

Clients of the hosted service use one number for the time that code may take and for the silence they bear. An answer that
came exactly when the code was stopped would lose that race. So the head of the answer goes out before, and single spaces
after it, which JSON allows; the price is that the status is 200 by then, whatever comes. Source: spec/api.md 0.5.

Whoever goes away meanwhile wants no answer any more, so the work for it is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from instavm.control.api.long import send_body
from instavm.errors import InstaVMError, NetworkError
from instavm.wire.executions import MaybeLate

log = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE_S: Final = 10.0
"""Longest gap between two bytes, and at most half of what the client bears."""
BEGIN_S: Final = 30.0
"""Latest begin of an answer: what stands between may give up on a silent connection, too."""
LEAD_S: Final = 2.0


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` returns; it is cancelled when the client goes away. The request's body must have been read.

    Raises: NetworkError, when the client went away; what `work` raises.
    """
    result: list[T] = []
    error: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_cancel_when_gone, request.receive, tasks.cancel_scope)
        try:
            result.append(await work)
        except Exception as exc:  # raised below, not wrapped by the group
            error = exc
        tasks.cancel_scope.cancel()
    if error is not None:
        raise error
    if not result:
        raise NetworkError("the client went away")
    return result[0]


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


class Patient(Response):
    """The answer of `work`, which runs while this is being sent.

    patience_s: how long the client bears silence, in seconds. stops: `work` is cancelled when the client goes away.
    """

    def __init__(self, work: Callable[[], Awaitable[Response]], patience_s: float, *, stops: bool) -> None:
        super().__init__()
        self._work = work
        self._stops = stops
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
                await self._until_done(receive)
            finally:
                begin.cancel()
                self._done.set()
        if self._begun:
            return
        if self._error is not None:
            raise self._error
        if self._answer is not None:
            await self._answer(scope, receive, send)

    async def _until_done(self, receive: Receive) -> None:
        """Afterwards there is an answer, or an error; or neither, and the client is gone."""
        async with anyio.create_task_group() as tasks:
            if self._stops:
                tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
            try:
                self._answer = await self._work()
            except Exception as exc:  # raised to who serves us, or told in the answer's body
                self._error = exc
            tasks.cancel_scope.cancel()

    async def _keep_alive(self, send: Send) -> None:
        self._begun = True
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not self._done.is_set():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            with anyio.move_on_after(self._gap_s):
                await self._done.wait()
        if self._answer is not None:
            await send_body(send, bytes(self._answer.body))
        elif self._error is not None:
            await send_body(send, _late(self._error))


def _late(error: Exception) -> bytes:
    """An error for which there is no status any more: a result that says so, with the error's code beside it."""
    if not isinstance(error, InstaVMError):
        log.error("an execution failed in a way that nobody foresaw", exc_info=error)
        error = InstaVMError("internal error")
    late = MaybeLate(code=error.code, detail=str(error), stdout="", stderr=f"[instavm] {error}\n", reason="vm_lost")
    return late.model_dump_json().encode()
