"""Routes of followed executions: run code and hear of it while it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Final

import anyio
from fastapi import APIRouter, Header, Query
from pydantic_core import to_json

from instavm.control.api.description import EventStream, problems
from instavm.control.api.errors import problem
from instavm.control.api.executions import result
from instavm.control.api.here import Caller, Here
from instavm.control.api.once import OnlyOnce
from instavm.control.executions import Ran
from instavm.control.streams import Event, Followed
from instavm.errors import InstaVMError
from instavm.wire import streams as wire
from instavm.wire.executions import Execute
from instavm.wire.text import parsed, presentable

router = APIRouter(tags=["streams"])

ALIVE_S: Final = 15.0
"""Longest silence on a stream: then a comment is sent, so that nothing on the way gives it up."""


@router.post("/execute/stream", response_class=EventStream, responses=problems(403, 404, 409))
async def begin(ask: Execute, once: OnlyOnce) -> EventStream:
    """It runs on when the client goes away."""
    caller, here = once.caller, once.here
    if ask.session_id is not None:
        await here.sessions.get(caller, ask.session_id)
    execution_id = await once.begin(lambda: here.streams.begin(caller, ask).id)
    return _stream(here.streams.get(caller, execution_id), 0)


@router.get("/v1/executions/{execution_id}/stream", response_class=EventStream, responses=problems(404))
async def follow(
    execution_id: str,
    caller: Caller,
    here: Here,
    after: Annotated[int | None, Query(ge=0)] = None,
    last: Annotated[int | None, Header(alias=wire.RESUME_HEADER, ge=0)] = None,
) -> EventStream:
    """What came after event number `after` (else after the one in the header), and what comes from now on."""
    return _stream(here.streams.get(caller, execution_id), after if after is not None else last or 0)


@router.post("/v1/executions/{execution_id}/cancel", responses=problems(404))
async def cancel(execution_id: str, caller: Caller, here: Here) -> wire.Cancelled:
    """Stop an execution that is followed. Its last event says so."""
    followed = here.streams.get(caller, execution_id)
    running = followed.ended_at is None
    here.streams.cancel(caller, execution_id)
    return wire.Cancelled(execution_id=followed.id, status="cancelling" if running else "ended")


def _stream(followed: Followed, after: int) -> EventStream:
    headers = {wire.ID_HEADER: followed.id, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventStream(_events(followed, after), headers=headers)


async def _events(followed: Followed, number: int) -> AsyncIterator[bytes]:
    yield b": follows\n\n"
    while True:
        found = None
        with anyio.move_on_after(ALIVE_S):
            found = await followed.after(number)
        if found is None:
            yield b": still there\n\n"
            continue
        yield b"".join(_event(followed, event) for event in found)
        if not found or found[-1].kind in ("result", "error"):
            return
        number = found[-1].number


def _event(followed: Followed, event: Event) -> bytes:
    return f"id: {event.number}\nevent: {event.kind}\ndata: {_data(followed, event)}\n\n".encode()


def _data(followed: Followed, event: Event) -> str:
    match event.told:
        case Ran() as ran:
            return result(followed.language, ran).model_dump_json()
        case InstaVMError() as error:
            return problem(error).model_dump_json(exclude_none=True)
        case str() as text if event.kind == "output":  # a guest wrote it: its line breaks would end the event
            return to_json(presentable(parsed(text))).decode()
        case text:
            return wire.Text(text=text).model_dump_json()
