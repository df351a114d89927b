"""A sandbox from its start to its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from instavm.contract.egress import NOTHING, Egress
from instavm.contract.isolation import Tier


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
    RESUMED = "resumed"
    """It was at rest, and goes on under another id."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    vm_id: str
    vcpus: int
    memory_mib: int
    image: str = "default"
    """`default`, or the id of a disk snapshot."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    egress: Egress = NOTHING
    resumes: str | None = None
    """The id of a sandbox at rest that this one goes on from; `image` and sizes are what they were."""
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
class Ended:
    """A sandbox ended without being told to."""

    vm_id: str
    reason: EndReason
    detail: str
    console: str = ""
    """The last lines of the guest's serial console, without control characters."""
