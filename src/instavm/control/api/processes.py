"""Routes of processes: start, list, read, follow, write, signal, wait."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from instavm import limits
from instavm.contract.processes import ProcessState
from instavm.control.api.description import IN_SANDBOX, EventStream, problems
from instavm.control.api.errors import problem
from instavm.control.api.here import Caller, Here
from instavm.control.api.once import OnlyOnce
from instavm.control.api.patience import while_connected
from instavm.control.processes import Window
from instavm.errors import InstaVMError
from instavm.wire import processes as wire
from instavm.wire.base import Wire
from instavm.wire.streams import RESUME_HEADER, Text

router = APIRouter(prefix="/v1/sessions/{session_id}/processes", tags=["processes"])

After = Annotated[int, Query(ge=0)]
Size = Annotated[int, Query(ge=limits.PROCESS_WINDOW_BYTES_MIN, le=limits.PROCESS_LOG_BYTES)]


@router.post("", response_model=wire.Process, responses=IN_SANDBOX)
async def start(session_id: str, ask: wire.StartProcess, once: OnlyOnce) -> Response:
    """It runs on when the call has returned, until it ends or the sandbox does."""
    caller, here = once.caller, once.here

    async def work() -> wire.Process:
        return _record(session_id, await here.processes.start(caller, session_id, ask))

    return await once.run(work)


@router.get("", responses=problems(404, 410))
async def listing(session_id: str, caller: Caller, here: Here) -> list[wire.Process]:
    """The processes of the session's sandbox; none without a sandbox."""
    return [_record(session_id, one) for one in await here.processes.list(caller, session_id)]


@router.get("/{process_id}", responses=IN_SANDBOX)
async def read(
    session_id: str,
    process_id: str,
    caller: Caller,
    here: Here,
    after: After = 0,
    size: Size = limits.PROCESS_LOG_BYTES,
) -> wire.ProcessOutput:
    """The process, and what it wrote behind position `after`, as far as it is kept."""
    window = await here.processes.read(caller, session_id, process_id, after, size)
    return wire.ProcessOutput(
        **_record(session_id, window.state).model_dump(),
        stdout="".join(text for channel, text, _ in window.pieces if channel == "stdout"),
        stderr="".join(text for channel, text, _ in window.pieces if channel == "stderr"),
        text="".join(text for _, text, _ in window.pieces),
        next=window.next,
        lost=window.lost,
    )


@router.post("/{process_id}/stdin", responses=IN_SANDBOX)
async def stdin(session_id: str, process_id: str, ask: wire.Stdin, caller: Caller, here: Here) -> wire.Process:
    """Write to the stdin of a process: all of it, or nothing."""
    state = await here.processes.write(caller, session_id, process_id, ask.decoded(), last=ask.close)
    return _record(session_id, state)


@router.post("/{process_id}/signal", responses=IN_SANDBOX)
async def signal(session_id: str, process_id: str, ask: wire.Signal, caller: Caller, here: Here) -> wire.Process:
    """To its process group; KILL to everything that it has started, also after its own end."""
    return _record(session_id, await here.processes.signal(caller, session_id, process_id, ask.signal))


@router.post("/{process_id}/wait", responses=IN_SANDBOX)
async def wait(
    request: Request, session_id: str, process_id: str, ask: wire.Wait, caller: Caller, here: Here
) -> wire.Process:
    """Answered when it has ended, and after `timeout` seconds in any case."""
    waiting = here.processes.wait(caller, session_id, process_id, ask.timeout)
    return _record(session_id, await while_connected(request, waiting))


@router.get("/{process_id}/stream", response_class=EventStream, responses=IN_SANDBOX)
async def follow(
    session_id: str,
    process_id: str,
    caller: Caller,
    here: Here,
    after: Annotated[int | None, Query(ge=0)] = None,
    last: Annotated[int | None, Header(alias=RESUME_HEADER, ge=0)] = None,
) -> EventStream:
    """What it wrote behind position `after` (else behind the one in the header), and what it writes from now on."""
    begin = after if after is not None else last or 0
    await here.processes.read(caller, session_id, process_id, begin, limits.PROCESS_WINDOW_BYTES_MIN)
    windows = here.processes.follow(caller, session_id, process_id, begin)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventStream(_events(session_id, windows), headers=headers)


async def _events(session_id: str, windows: AsyncGenerator[Window, None]) -> AsyncIterator[bytes]:
    yield b": follows\n\n"
    try:
        async with aclosing(windows):
            async for window in windows:
                yield b"".join(_told(session_id, window)) or b": still there\n\n"
    except InstaVMError as exc:
        yield _event(0, "error", problem(exc))


def _told(session_id: str, window: Window) -> list[bytes]:
    told = []
    if window.lost:
        first = window.state.log_begin
        told.append(_event(first, "lost", wire.Lost(bytes=window.lost)))
    told += [_event(position, channel, Text(text=text)) for channel, text, position in window.pieces]
    if window.last:
        told.append(_event(window.next, "exit", _record(session_id, window.state)))
    return told


def _event(position: int, kind: str, data: Wire) -> bytes:
    return f"id: {position}\nevent: {kind}\ndata: {data.model_dump_json()}\n\n".encode()


def _record(session_id: str, state: ProcessState) -> wire.Process:
    end = state.ended
    return wire.Process(
        process_id=state.id,
        session_id=session_id,
        status="running" if end is None else "exited",
        command=state.command,
        cwd=state.cwd,
        pid=state.pid,
        started_at=state.started_at,
        stdin_open=state.takes_input,
        written=state.log_end,
        kept_from=state.log_begin,
        exit_code=None if end is None else end.exit_code,
        signal=None if end is None else end.signal,
        reason=None if end is None else end.reason,
        execution_time=None if end is None else end.wall_s,
        cpu_time=None if end is None else end.cpu_s,
        peak_memory_bytes=None if end is None else end.peak_memory_bytes,
    )
