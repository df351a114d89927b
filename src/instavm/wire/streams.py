"""`POST /execute/stream`: an execution as server-sent events, and how to come back to it.

Each event has an `id` (a number, counted from 1), an `event` and one line of JSON as `data`:

    stdout, stderr   Text
    output           one rich output, {MIME type: data}
    result           executions.Execution, without what the events before it have told; the last event
    error            errors.Problem; the last event
"""

from __future__ import annotations

from typing import Final, Literal

from instavm.wire.base import Wire

ID_HEADER: Final = "X-Execution-Id"
"""In the head of every stream: under this id it can be followed again, and cancelled."""
RESUME_HEADER: Final = "Last-Event-ID"


class Text(Wire):
    text: str


class Cancelled(Wire):
    """Answer to a cancel: whether it was still running."""

    execution_id: str
    status: Literal["cancelling", "ended"]
