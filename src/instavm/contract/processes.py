"""Processes in the background of a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

ProcessWait = Literal["now", "more", "end"]
"""What a reader of a process's log waits for: nothing, more of it (or the end), the end."""


Channel = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process that is to run in the background. `shown`: its command for people, not longer than it need be."""

    id: str
    argv: tuple[str, ...]
    shown: str
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a process or a command ended. Times are seconds. `signal`, `reason`: as in `Outcome`."""

    exit_code: int
    signal: int | None
    reason: str | None
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A process as its sandbox tells of it. Positions count the bytes that it has written, on both streams together."""

    id: str
    command: str
    cwd: str
    pid: int | None
    started_at: datetime
    """By the sandbox's clock."""
    takes_input: bool
    log_begin: int
    """Position of the oldest byte that is kept."""
    log_end: int
    ended: ProcessEnd | None = None


@dataclass(frozen=True, slots=True)
class ProcessLog:
    """A window of what a process wrote, in order. `next`: where to read on; `lost`: bytes that are not kept any more."""

    state: ProcessState
    pieces: tuple[tuple[Channel, bytes], ...]
    next: int
    lost: int
