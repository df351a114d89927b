"""Suspended sandboxes, snapshots and images on a node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stored:
    """Something at rest on a node. Bytes are those on the host's disk; shared ones belong to others too."""

    name: str
    own_bytes: int
    shared_bytes: int
    pause_ms: float = 0.0
    """How long the sandbox stood still for it."""


@dataclass(frozen=True, slots=True)
class Pull:
    """An image to fetch. `reference`: of a registry, or `oci:` / `docker-archive:` and a path on the node.

    disk_gib: size of the disk that is made of it; None = what it takes, with room.
    """

    reference: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    disk_gib: int | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What an image turned out to be. `digest`: of its manifest, `sha256:…`."""

    stored: Stored
    digest: str
    env: Mapping[str, str]
    labels: Mapping[str, str]
