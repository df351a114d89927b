"""Calls that run code."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from instavm import limits
from instavm.client.calls.base import Call, ask, body_of, reading, segment
from instavm.client.errors import from_answer
from instavm.client.results import Execution
from instavm.wire import executions as wire
from instavm.wire.streams import Cancelled

CODE: Final = {"command": "code"}
"""Wire field → argument."""
START_S: Final = 180.0
"""Added to the time the code may take: its sandbox may have to boot, and other code may be running there."""


def execute(session_id: str | None, code: str, language: str, timeout: float | None) -> Call[Execution]:
    """Run code and wait for its end.

    The server stops the code when its time is up and answers with what there is; the client waits longer than
    that, so that the answer always wins.
    Raises: InvalidInput.
    """
    given = ask(wire.Execute, CODE, command=code, session_id=session_id, language=language, timeout=timeout)
    code_s = limits.EXECUTE_TIMEOUT_S_DEFAULT if given.timeout is None else given.timeout
    return Call(
        "POST",
        "/execute",
        _result,
        body_of(given),
        answer_s=code_s + START_S,
        repeatable=False,
    )


def cancel(execution_id: str) -> Call[bool]:
    """Stop a followed execution; whether it was still running."""
    path = f"/v1/executions/{segment(execution_id=execution_id)}/cancel"
    return Call("POST", path, lambda raw: reading(Cancelled)(raw).status == "cancelling", b"{}")


def _result(raw: bytes) -> Execution:
    """Raises: what the server had to say after its answer had begun; NetworkError."""
    result = reading(wire.MaybeLate)(raw)
    if result.code is not None:
        raise from_answer(HTTPStatus.OK, raw)
    return Execution(result.model_dump(mode="json", exclude={"code", "detail"}))
