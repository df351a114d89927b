"""Calls about tasks: code that nobody waits for."""

from __future__ import annotations

from instavm.client.calls.base import Call, ask, body_of, reading, segment
from instavm.client.calls.executions import CODE
from instavm.client.results import Task, TaskBegun
from instavm.wire import tasks as wire


def begin(session_id: str, code: str, language: str, timeout: float | None) -> Call[TaskBegun]:
    """Raises: InvalidInput."""
    given = ask(wire.ExecuteAsync, CODE, command=code, session_id=session_id, language=language, timeout=timeout)
    read = reading(wire.TaskBegun)
    return Call(
        "POST",
        "/execute_async",
        lambda raw: TaskBegun(read(raw).model_dump(mode="json")),
        body_of(given),
        repeatable=False,
    )


def get(task_id: str) -> Call[Task]:
    read = reading(wire.Task)
    return Call("GET", f"/v1/executions/{segment(task_id=task_id)}", lambda raw: Task(read(raw).model_dump(mode="json")))
