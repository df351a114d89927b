"""Processes over the wire: `/v1/sessions/{session_id}/processes` and below.

`GET …/{process_id}/stream` tells server-sent events, each with the position behind it as its `id`, which is good for any
server that has the session, now or later:

    stdout, stderr   streams.Text
    lost             Lost: so many bytes were written before this and are not kept any more
    exit             Process; the last event
    error            errors.Problem; the last event
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from instavm import limits
from instavm.errors import InvalidInput
from instavm.wire.base import Asked, Timestamp, Wire
from instavm.wire.env import Env


def _command(value: object) -> object:
    words = [value] if isinstance(value, str) else value
    good = (
        isinstance(words, list)
        and 0 < len(words) <= limits.PROCESS_WORDS
        and all(isinstance(word, str) and "\0" not in word for word in words)
        and bool(words[0].strip())
        and (size := _size("\0".join(words))) is not None
        and size <= limits.PROCESS_COMMAND_BYTES
    )
    if not good:
        raise InvalidInput("command", value, limits.ALLOWED["process command"])
    return value


def _size(text: str) -> int | None:
    """In bytes of UTF-8; None if it cannot be written as that."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _path(path: str) -> str:
    size = _size(path)
    if not path or "\0" in path or size is None or size > limits.PATH_BYTES:
        raise ValueError("no path")
    return path


def _signal(value: object) -> object:
    """A name in any of its spellings, or a number, as the one name."""
    if isinstance(value, str):
        name = value.upper().removeprefix("SIG")
        return name if name in limits.SIGNALS else value
    return next((name for name, number in limits.SIGNALS.items() if value is not True and number == value), value)


def _known(name: str) -> str:
    if name not in limits.SIGNALS:
        raise ValueError("unknown signal")
    return name


def _wait_s(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= float(str(value)) <= limits.PROCESS_WAIT_S_MAX:
        raise InvalidInput("timeout", value, limits.ALLOWED["process timeout"])
    return value


class StartProcess(Asked):
    """A `command` of one string is for the shell; a list is a program and its arguments."""

    command: Annotated[str | list[str], BeforeValidator(_command)]
    shell: Literal["bash", "sh"] = "bash"
    cwd: Annotated[str, AfterValidator(_path)] = "/app"
    """Relative ones start at /app."""
    env: Env = Field(default_factory=dict, repr=False)
    """Besides the session's own."""


class Process(Wire):
    """A process of a session's sandbox. It is known as long as that sandbox lives."""

    process_id: str
    session_id: str
    status: Literal["running", "exited"]
    command: str
    cwd: str
    pid: int | None
    """In the sandbox."""
    started_at: Timestamp
    stdin_open: bool
    written: int
    """Bytes of output so far; the latest are kept."""
    kept_from: int
    """Position of the oldest byte of output that is kept."""
    exit_code: int | None = None
    signal: int | None = None
    """The signal that ended it."""
    reason: str | None = None
    """None = it ended by itself, or by a signal; else as in `executions.Execution`: oom, pids, disk_full."""
    execution_time: float | None = None
    """Seconds from its start to its end."""
    cpu_time: float | None = None
    peak_memory_bytes: int | None = None


class ProcessOutput(Process):
    """A process and a window of its output."""

    stdout: str
    stderr: str
    text: str
    """Both, in the order in which they came."""
    next: int
    """Where to read on."""
    lost: int
    """Bytes between `after` and the window that are not kept any more."""


class Lost(Wire):
    bytes: int


class Stdin(Asked):
    data: str = ""
    encoding: Literal["utf-8", "base64"] = "utf-8"
    close: bool = False
    """Whether its stdin ends behind this."""

    @field_validator("data", mode="after")
    @classmethod
    def _bounded(cls, data: str, _info: ValidationInfo) -> str:
        if len(data) > 2 * limits.PROCESS_INPUT_BYTES:
            raise InvalidInput("data", f"{len(data)} characters", limits.ALLOWED["data"])
        return data

    def decoded(self) -> bytes:
        """Raises: InvalidInput, which does not repeat it."""
        try:
            data = base64.b64decode(self.data, validate=True) if self.encoding == "base64" else self.data.encode()
        except (binascii.Error, ValueError):
            raise InvalidInput("data", f"what is not {self.encoding}", limits.ALLOWED["data"]) from None
        if len(data) > limits.PROCESS_INPUT_BYTES:
            raise InvalidInput("data", f"{len(data)} bytes", limits.ALLOWED["data"])
        return data


class Signal(Asked):
    signal: Annotated[str, BeforeValidator(_signal), AfterValidator(_known)]


class Wait(Asked):
    timeout: Annotated[float, BeforeValidator(_wait_s), Field(json_schema_extra={"maximum": 60})] = 30.0
    """Seconds."""
