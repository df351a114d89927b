"""Tasks over the wire: `POST /execute_async`, `GET /v1/executions/`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from instavm import limits
from instavm.wire.base import Timestamp, Wire
from instavm.wire.executions import Execute

TaskTimeoutS = Annotated[float, Field(strict=True, ge=limits.EXECUTE_TIMEOUT_S_MIN, allow_inf_nan=False)]


class ExecuteAsync(Execute):
    """As `Execute`, but the timeout may be as long as the sandbox lives; a longer one means until its end."""

    timeout: TaskTimeoutS | None = None


class TaskBegun(Wire):
    task_id: str
    session_id: str
    status: str
    language: str
    created_at: Timestamp


class Task(Wire):
    """A task and, once `is_complete`, its result. `serialized_*` are plain text: the names are the hosted service's."""

    task_id: str
    session_id: str
    vm_id: str | None = None
    status: str
    """pending, running, completed, failed (the exit code is not 0), timeout, killed (it ended with its sandbox)."""
    is_complete: bool
    language: str
    exit_code: int | None = None
    stdout: str
    stderr: str
    serialized_stdout: str
    serialized_stderr: str
    execution_time: float | None = None
    cpu_time: float | None = None
    truncated: bool = False
    reason: str | None = None
    created_at: Timestamp
    finished_at: Timestamp | None = None
