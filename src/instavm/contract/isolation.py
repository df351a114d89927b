"""What confines a sandbox: tiers, and the signed report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Tier(StrEnum):
    """What confines a sandbox. Shown to users, never hidden."""

    KVM = "kvm"
    EMULATED = "emulated"

    def satisfies(self, wanted: Tier | None) -> bool:
        """Whether it is at least as strong."""
        return wanted is None or self is Tier.KVM or wanted is Tier.EMULATED


@dataclass(frozen=True, slots=True)
class Isolation:
    """What confines a sandbox now, signed by its host: as `wire.isolation.Isolation`."""

    report: Mapping[str, Any]
    signature: str
    public_key: str
