"""What a sandbox may reach, and what it reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Egress:
    """What a sandbox may reach; the default is nothing. What each field opens, and what nothing opens: docs/network.md."""

    packages: bool = False
    """The registries that the image's package managers use."""
    http: bool = False
    https: bool = False
    domains: tuple[str, ...] = ()
    """Lower case, without a dot at the end; `*.name` stands for every name below it."""
    cidrs: tuple[str, ...] = ()

    @property
    def opens(self) -> bool:
        """Whether anything at all may be reached."""
        return self.packages or self.http or self.https or bool(self.domains or self.cidrs)


NOTHING: Final = Egress()


@dataclass(frozen=True, slots=True)
class Seen:
    """One destination that a sandbox went for: `rule` is what allowed it, or why it was refused."""

    name: str | None
    address: str | None
    port: int
    protocol: str
    allowed: bool
    rule: str
    count: int
    first_at: float | None = None
    """Seconds since the epoch; None where only a count is kept."""
    last_at: float | None = None
    registry: bool = False
    """Whether it is one of the image's package registries."""


@dataclass(frozen=True, slots=True)
class EgressLog:
    """Where a sandbox went, or tried to, since it has its network; bytes are those of connections that were allowed."""

    seen: tuple[Seen, ...] = ()
    bytes_sent: int = 0
    bytes_received: int = 0
    open_connections: int = 0


@dataclass(frozen=True, slots=True)
class EgressDecision:
    """What the egress filter says about one destination. `rule`: as in `Seen`. `name` or `address`: what was asked for.

    address: with a name, one that it resolves to and that may not be reached.
    """

    allowed: bool
    rule: str
    name: str | None
    address: str | None = None
    registry: bool = False
    """Whether it is a package registry of the image, or of the operator."""
    operators: bool = False
    """Whether it is allowed because the operator named it."""
