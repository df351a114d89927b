"""The host of a node, and what the node counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from instavm.contract.isolation import Tier


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of the machine that sandboxes run on, in MiB. `available`: what could be used now without swapping."""

    total_mib: int
    available_mib: int


@dataclass(frozen=True, slots=True)
class NodeMetrics:
    """What a node counts, since its server began or at this moment. Nothing in it is about one sandbox or one user."""

    running: int
    waiting: Mapping[str, int]
    """Machines made ahead of a request, by how far they are: `spare_machine`, `warm_machine`."""
    starts: Mapping[str, int]
    """Sandboxes that came up, by what they were made of: `machine` (nothing was there), the two above, `saved_machine`."""
    start_seconds: Mapping[str, float]
    """How long these starts took, added up."""
    cold: int
    """How many of them had to boot their template first."""
    failed: int
    """Starts that failed, whatever the reason."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    driver: str
    driver_version: str
    tier: Tier
    probe: str
    """How the tier was established, in words."""
    images: Mapping[str, str]
    """Name → content digest."""
