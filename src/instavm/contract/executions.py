"""One run of code, and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from instavm.contract.egress import Seen

Stream = Literal["stdout", "stderr", "output"]
"""`output`: one rich output, whole, as a JSON object {MIME type: data}."""


OutputSink = Callable[[Stream, bytes], None]


Bundle = Mapping[str, object]
"""One rich output: MIME type → data; text as it is, JSON as values, anything else as base64."""


@dataclass(frozen=True, slots=True)
class Command:
    code: str
    language: str
    timeout_s: float
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    task: str | None = None
    """A name under which the sandbox runs this once and keeps what it wrote and how it ended. Sent again under the same
    name (with no code, if it is not known any more), it is waited for and not run again: servers may come and go."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one command. Code that failed is an outcome too, not an error."""

    stdout: str
    stderr: str
    exit_code: int
    execution_time_s: float
    cpu_time_s: float
    timed_out: bool = False
    truncated: bool = False
    reason: str | None = None
    """None = it ended by itself; else what ended it: timeout, interpreter_crashed, oom …"""
    signal: int | None = None
    """The signal that ended it."""
    peak_memory_bytes: int = 0
    """Largest resident size of one process of it."""
    outputs: tuple[Bundle, ...] = ()
    refused: tuple[Seen, ...] = ()
    """What the sandbox's network refused while it ran, whoever in the sandbox asked for it; bounded."""
