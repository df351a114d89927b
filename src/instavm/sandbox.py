"""The words that control and node share: what is asked of a node, and what it answers.

Frozen values only; no I/O. Control decides with them, a node acts on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Tier(StrEnum):
    """What confines a sandbox. Shown to users, never hidden."""

    KVM = "kvm"
    EMULATED = "emulated"

    def satisfies(self, wanted: Tier | None) -> bool:
        """Whether it is at least as strong."""
        return wanted is None or self is Tier.KVM or wanted is Tier.EMULATED


class EndReason(StrEnum):
    """Why a sandbox is gone."""

    KILLED = "killed"
    LIFETIME = "lifetime"
    BOOT_FAILED = "boot_failed"
    CRASHED = "crashed"
    OVER_LIMIT = "over_limit"
    """Its VMM used more of the host than a sandbox of its size may."""
    NODE_LOST = "node_lost"
    SERVER_STOPPED = "server_stopped"


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    vm_id: str
    vcpus: int
    memory_mib: int
    image: str = "default"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    require_isolation: Tier | None = None
    """The weakest tier that will do; on less it is not started."""


@dataclass(frozen=True, slots=True)
class Started:
    """A sandbox that is ready for user code: restored, and made different from every other clone."""

    vm_id: str
    driver: str
    tier: Tier
    cold: bool
    """True when this size was asked for the first time and its template had to be booted."""
    steps_ms: Mapping[str, float]
    """Milliseconds per step, in the order they happened; they add up to the whole."""


@dataclass(frozen=True, slots=True)
class Command:
    code: str
    language: str
    timeout_s: float
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    task: str | None = None
    """A name under which the sandbox runs this once and keeps what it wrote and how it ended. Sent again under the same
    name (with no code, if it is not known any more), it is waited for and not run again: servers may come and go."""


Stream = Literal["stdout", "stderr", "output"]
"""`output`: one rich output, whole, as a JSON object {MIME type: data}."""
OutputSink = Callable[[Stream, bytes], None]
Bundle = Mapping[str, object]
"""One rich output: MIME type → data; text as it is, JSON as values, anything else as base64."""


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


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was written: where it came to lie (absolute), and its bytes."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of the machine that sandboxes run on, in MiB. `available`: what could be used now without swapping."""

    total_mib: int
    available_mib: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A sandbox ended without being told to."""

    vm_id: str
    reason: EndReason
    detail: str


@dataclass(frozen=True, slots=True)
class Isolation:
    """What confines a sandbox now, signed by its host: as `wire.isolation.Isolation`."""

    report: Mapping[str, Any]
    signature: str
    public_key: str


@dataclass(frozen=True, slots=True)
class NodeInfo:
    driver: str
    driver_version: str
    tier: Tier
    probe: str
    """How the tier was established, in words."""
    images: Mapping[str, str]
    """Name → content digest."""
