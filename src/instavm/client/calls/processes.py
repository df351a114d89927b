"""Calls about processes in the background."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from instavm import limits
from instavm.client.calls.base import Call, ask, body_of, reading, segment
from instavm.client.calls.files import RemotePath, remote_path
from instavm.client.results import ProcessInfo, ProcessOutput, Record
from instavm.client.streaming import SILENCE_S, Events, nothing
from instavm.errors import InvalidInput, NetworkError
from instavm.wire import processes as wire
from instavm.wire.base import Wire

R = TypeVar("R", bound=Record)

START_S = 180.0
"""The sandbox may have to boot first."""
WAIT_S = 30.0
"""How long one request waits for the end of a process."""

_LISTED = TypeAdapter(list[wire.Process])


class ProcessEvent(Record):
    """Something that a process told: `type` is stdout, stderr, lost or exit.

    text: of stdout and stderr. lost: bytes that were written before this and are not kept any more. process: the
        `ProcessInfo`, with the last event. position: where to follow on, should this be the last one that was read.
    """

    type: str
    position: int
    text: str
    lost: int
    process: ProcessInfo


def start(
    session_id: str, command: str | Sequence[str], shell: str, cwd: RemotePath | None, env: Mapping[str, Any] | None
) -> Call[ProcessInfo]:
    """Raises: InvalidInput."""
    words = isinstance(command, Sequence) and not isinstance(command, str | bytes | bytearray)
    given = ask(
        wire.StartProcess,
        command=list(command) if words else command,
        shell=shell,
        cwd=None if cwd is None else remote_path(cwd, "cwd"),
        env=env,
    )
    body = body_of(given)
    read = _as(wire.Process, ProcessInfo)
    return Call("POST", _path(session_id), read, body, answer_s=START_S, repeatable=False)


def listing(session_id: str) -> Call[list[ProcessInfo]]:
    return Call("GET", _path(session_id), _listed)


def read(session_id: str, process_id: str, after: int) -> Call[ProcessOutput]:
    """Raises: InvalidInput."""
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        raise InvalidInput("after", after, limits.ALLOWED["after"])
    read = _as(wire.ProcessOutput, ProcessOutput)
    return Call("GET", _path(session_id, process_id), read, params={"after": str(after)})


def write(session_id: str, process_id: str, data: str | bytes, close: bool) -> Call[ProcessInfo]:
    """Raises: InvalidInput."""
    try:
        raw = data.encode() if isinstance(data, str) else bytes(memoryview(data))
    except (TypeError, UnicodeEncodeError):
        raise InvalidInput("data", f"a {type(data).__name__}", "bytes, or text that can be written as UTF-8") from None
    given = ask(wire.Stdin, data=base64.b64encode(raw).decode(), encoding="base64", close=close)
    given.decoded()
    return _post(session_id, process_id, "stdin", given, repeatable=False)


def signal(session_id: str, process_id: str, name: str | int) -> Call[ProcessInfo]:
    """Raises: InvalidInput."""
    return _post(session_id, process_id, "signal", ask(wire.Signal, signal=name), repeatable=False)


def wait(session_id: str, process_id: str, timeout_s: float | None) -> Call[ProcessInfo]:
    """One turn of waiting, `WAIT_S` at most."""
    given = ask(wire.Wait, timeout=WAIT_S if timeout_s is None else max(0.0, min(WAIT_S, timeout_s)))
    return _post(session_id, process_id, "wait", given, repeatable=True)


class Follower(Events):
    """Of a process's output: the position in it is where it is taken up again, by whatever server."""

    def __init__(self, session_id: str, process_id: str, after: int) -> None:
        super().__init__()
        self._where = _path(session_id, process_id, "stream")
        self._position = after

    def call(self) -> Call[None]:
        return Call("GET", self._where, nothing, params={"after": str(self._position)}, answer_s=SILENCE_S)

    def _complete(self, kind: str, number: int, data: dict[str, Any]) -> ProcessEvent:
        self._position = number
        if kind == "exit":
            self.ended = True
            return ProcessEvent(type=kind, position=number, process=ProcessInfo(data))
        if kind == "lost":
            return ProcessEvent(type=kind, position=number, lost=data["bytes"])
        return ProcessEvent(type=kind, position=number, text=data["text"])


def _post(session_id: str, process_id: str, what: str, given: Wire, *, repeatable: bool) -> Call[ProcessInfo]:
    body = given.model_dump_json().encode()
    read = _as(wire.Process, ProcessInfo)
    return Call("POST", _path(session_id, process_id, what), read, body, repeatable=repeatable)


def _path(session_id: str, *more: str) -> str:
    return "/".join(("/v1/sessions", segment(session_id=session_id), "processes", *(segment(process_id=one) for one in more)))


def _as(model: type[Wire], result: type[R]) -> Any:
    read = reading(model)
    return lambda raw: result(read(raw).model_dump(mode="json"))


def _listed(raw: bytes) -> list[ProcessInfo]:
    try:
        return [ProcessInfo(one.model_dump(mode="json")) for one in _LISTED.validate_json(raw)]
    except ValidationError:
        raise NetworkError("the server's answer is not a list of processes") from None
