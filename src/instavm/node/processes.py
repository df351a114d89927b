"""Processes in the background, over the line to the agent of their sandbox, which keeps them and what they write.

Nothing of them is held here. The guest is hostile: whatever it tells is checked and bounded.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import UTC, datetime

import anyio

from instavm.contract.executions import Stream
from instavm.contract.processes import Channel, ProcessEnd, ProcessLog, ProcessSpec, ProcessState, ProcessWait
from instavm.errors import (
    ExecutionError,
    GuestProtocolError,
    InstaVMError,
    OutcomeUnknown,
    ProcessEnded,
    ProcessError,
    ProcessNotFound,
    RateLimitError,
)
from instavm.node.agent import ANSWER_S, Agent, Request, within
from instavm.node.ended import ended
from instavm_guest import frames

LISTED_MAX = 128
STATE_BYTES = 64 << 10
"""Longest state: paths and commands may grow sixfold as JSON."""
POSITION_MAX = 1 << 60
NANOSECONDS_MAX = 1 << 63
PID_MAX = 1 << 22


class Asked(Request):
    """A request about one process, and the pieces that come back. Keeps no more than `size` bytes."""

    def __init__(self, process_id: str, size: int) -> None:
        super().__init__(None)
        self._id = process_id
        self._room = size
        self.pieces: list[tuple[Channel, bytes]] = []

    def output(self, stream: Stream, data: bytes) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise frames.FrameError("the guest sent more of a log than it was asked for")
        self.pieces.append(("stderr" if stream == "stderr" else "stdout", data))

    def refusal(self, told: frames.Message) -> InstaVMError:
        text = f"process {self._id}: {str(told.get('message'))[:500]}"
        match told.get("code"):
            case "no_process":
                return ProcessNotFound(text)
            case "process_ended":
                return ProcessEnded(text)
            case "stdin_closed" | "stdin_full":
                return ProcessError(text)
            case "too_many":
                return RateLimitError(f"{text}; end some")
        return ExecutionError(f"the guest's agent: {text}")


async def start(agent: Agent, spec: ProcessSpec) -> ProcessState:
    ask = {
        "do": "start",
        "name": spec.id,
        "argv": spec.argv,
        "command": spec.shown,
        "cwd": spec.cwd,
        "env": dict(spec.env),
    }
    return _state((await _ask(agent, spec.id, ask)).answer)


async def listing(agent: Agent) -> list[ProcessState]:
    told = await _ask(agent, "", {"do": "list"}, LISTED_MAX * STATE_BYTES)
    lines = b"".join(data for _, data in told.pieces).splitlines()
    if len(lines) > LISTED_MAX:
        raise GuestProtocolError(f"the guest lists {len(lines)} processes")
    try:
        return [_state(frames.decode_json(line)) for line in lines]
    except frames.FrameError as exc:
        raise GuestProtocolError(f"the guest's list of processes: {exc}") from None


async def read(
    agent: Agent, process_id: str, since: int, size: int, until: ProcessWait, timeout_s: float
) -> ProcessLog:
    ask = {"do": "read", "name": process_id, "since": since, "size": size, "until": until}
    told: Asked | None = None
    if until != "now":
        with anyio.move_on_after(timeout_s):
            told = await _ask(agent, process_id, ask, size, timeout_s + ANSWER_S)
    if told is None:
        told = await _ask(agent, process_id, {**ask, "until": "now"}, size)
    state = _state(told.answer)
    lost = max(0, state.log_begin - since)
    return ProcessLog(state, tuple(told.pieces), since + lost + sum(len(data) for _, data in told.pieces), lost)


async def write(agent: Agent, process_id: str, data: bytes, last: bool) -> ProcessState:
    ask = {"do": "write", "name": process_id, "data": base64.b64encode(data).decode(), "last": last}
    return _state((await _ask(agent, process_id, ask)).answer)


async def send_signal(agent: Agent, process_id: str, signum: int) -> ProcessState:
    return _state((await _ask(agent, process_id, {"do": "signal", "name": process_id, "signal": signum})).answer)


async def _ask(
    agent: Agent, process_id: str, ask: Mapping[str, object], size: int = 0, timeout_s: float = ANSWER_S
) -> Asked:
    request = Asked(process_id, size)
    try:
        async with agent.exchange(request) as number:
            await agent.send(frames.PROCESS, number, frames.json_payload(dict(ask)))
            await within(request.done, timeout_s)
    except TimeoutError:
        raise OutcomeUnknown("the guest's agent does not answer any more") from None
    if request.error is not None:
        raise request.error
    return request


def _state(told: dict[str, object] | None) -> ProcessState:
    """Raises: GuestProtocolError."""
    if told is None:
        raise GuestProtocolError("the guest ended a request without an answer")
    name, command, cwd, pid = told.get("name"), told.get("command"), told.get("cwd"), told.get("pid")
    if not (isinstance(name, str) and isinstance(cwd, str) and isinstance(command, str)):
        raise GuestProtocolError("the guest's word about a process can't be read")
    begin, end = _whole(told.get("begin"), POSITION_MAX), _whole(told.get("end"), POSITION_MAX)
    started_ns = _whole(told.get("started_ns"), NANOSECONDS_MAX)
    return ProcessState(
        id=name[:100],
        command=command,
        cwd=cwd,
        pid=None if pid is None else _whole(pid, PID_MAX),
        started_at=datetime.fromtimestamp(started_ns / 1e9, UTC),
        takes_input=told.get("stdin") is True,
        log_begin=min(begin, end),
        log_end=end,
        ended=_end(told["ended"]) if "ended" in told else None,
    )


def _end(told: object) -> ProcessEnd:
    try:
        return ended(bytes.fromhex(str(told)))[0]
    except ValueError:
        raise GuestProtocolError(f"the guest's word about a process's end is {str(told)[:100]}") from None


def _whole(value: object, top: int) -> int:
    if type(value) is not int or not 0 <= value < top:
        raise GuestProtocolError(f"the guest's number is {str(value)[:40]}")
    return value
