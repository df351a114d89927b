"""The processor that a saved state depends on: the host's own, or what Firecracker is told to show of it (a CPU template)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from instavm.errors import HostNotReady


def host() -> str:
    """The host's processor with all that its guests may find out about it."""
    told = _told()
    flags = hashlib.sha256(told.get("flags", "").encode()).hexdigest()[:12]
    return " ".join([*(told.get(name, "?") for name in ("vendor_id", "cpu family", "model", "model name")), flags])


@dataclass(frozen=True, slots=True)
class CpuTemplate:
    """What guests see of the processor: one of Firecracker's own templates by its name, or one of the operator's, as JSON."""

    name: str
    custom: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, wanted: str | None) -> Self | None:
        """wanted: a name, or the absolute path of a file. Raises HostNotReady: there is no such file, or it is no JSON object."""
        if wanted is None:
            return None
        if not wanted.startswith("/"):
            return cls(wanted)
        try:
            data = Path(wanted).read_bytes()
            custom = json.loads(data)
        except (OSError, ValueError) as exc:
            raise HostNotReady(f"INSTAVM_FIRECRACKER_CPU_TEMPLATE: {wanted} can't be read: {exc}") from exc
        if not isinstance(custom, dict):
            raise HostNotReady(f"INSTAVM_FIRECRACKER_CPU_TEMPLATE: {wanted} is no CPU template, which is a JSON object")
        return cls(f"custom {hashlib.sha256(data).hexdigest()[:32]}", custom)

    def shown(self) -> str:
        """What a state that was saved under it depends on: no more of the host than who made its processor."""
        return f"{_told().get('vendor_id', '?')} as CPU template {self.name}"


def _told() -> dict[str, str]:
    for block in Path("/proc/cpuinfo").read_text().split("\n\n"):
        pairs = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        return {name.strip(): value.strip() for name, value in pairs.items()}
    return {}
