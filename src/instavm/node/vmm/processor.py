"""The processor that a saved state depends on: the host's own, or what Firecracker is told to show of it (a CPU template)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from instavm.errors import HostNotReady

VIRTUALIZATION: Final = ((0x1, "ecx", 5), (0x80000001, "ecx", 2))
"""CPUID leaf, register and bit of VMX and SVM."""


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

    @property
    def nests(self) -> bool:
        """Whether it is known to show the host's virtualization extensions, if its KVM has any to show."""
        return self.name == "T2A"

    def shown(self) -> str:
        """What a state that was saved under it depends on: no more of the host than who made its processor."""
        return f"{_told().get('vendor_id', '?')} as CPU template {self.name}"


def without_virtualization(custom: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A custom CPU template that shows what `custom` does, but for the virtualization extensions of Intel and AMD."""
    template = {**(custom or {})}
    leaves = [dict(leaf) for leaf in template.get("cpuid_modifiers", ())]
    for leaf, register, bit in VIRTUALIZATION:
        found = next((one for one in leaves if _same(one, leaf)), None)
        if found is None:
            found = {"leaf": hex(leaf), "subleaf": "0x0", "flags": 0, "modifiers": []}
            leaves.append(found)
        modifiers = [dict(one) for one in found["modifiers"]]
        changed = next((one for one in modifiers if one["register"] == register), None)
        if changed is None:
            changed = {"register": register, "bitmap": "0b" + "x" * 32}
            modifiers.append(changed)
        changed["bitmap"] = _cleared(str(changed["bitmap"]), bit)
        found["modifiers"] = modifiers
    return {**template, "cpuid_modifiers": leaves}


def _same(modified: Mapping[str, Any], leaf: int) -> bool:
    return (int(str(modified["leaf"]), 0), int(str(modified.get("subleaf", "0")), 0)) == (leaf, 0)


def _cleared(bitmap: str, bit: int) -> str:
    """A bitmap of Firecracker's, such as 0b1x_0 (x: as the host has it), with one bit of 32 zero."""
    bits = bitmap.removeprefix("0b").replace("_", "").rjust(32, "x")
    at = len(bits) - 1 - bit
    return f"0b{bits[:at]}0{bits[at + 1 :]}"


def _told() -> dict[str, str]:
    for block in Path("/proc/cpuinfo").read_text().split("\n\n"):
        pairs = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        return {name.strip(): value.strip() for name, value in pairs.items()}
    return {}
