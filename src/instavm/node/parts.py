"""The parts that confine a sandbox: their versions, their ages, and what is known to be wrong with them.

The list of known faults (`known_bad.json`) is shipped with the package and has a date. A part is on it by its version, or, where
distributions bring fixes into older versions, by the day on which it was built. A version that can't be compared is not judged.
"""

from __future__ import annotations

import json
import platform
import re
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final

from instavm.contract.isolation import Tier

FIRMWARE: Final = (Path("/usr/share/qemu/bios-microvm.bin"), Path("/usr/share/seabios/bios-microvm.bin"))
"""Where QEMU looks for the firmware of its microvm machine, in that order."""
HEADER_BYTES: Final = 0x8000
_DATE: Final = re.compile(r"\b(20\d\d-\d\d-\d\d)\b|\b([A-Z][a-z]{2}) +(\d+) [\d:]+ \w+ (20\d\d)\b")
_UPSTREAM: Final = re.compile(r"Debian (\d+\.\d+\.\d+)")
_DISTRIBUTIONS: Final = re.compile(r"^\d+\.\d+\.0-\d")
"""Such as 5.15.0-91-generic: fixes came in since, and the number does not say which."""


@dataclass(frozen=True, slots=True)
class Fault:
    date: str
    id: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.id} ({self.date}): {self.sentence}"


@dataclass(frozen=True, slots=True)
class Part:
    """name: its role. component: what it is. built: its day, None when nothing tells. compared: as faults are listed by."""

    name: str
    component: str
    version: str
    built: date | None = None
    compared: str | None = None
    faults: tuple[Fault, ...] = ()

    @property
    def age_days(self) -> int | None:
        return None if self.built is None else (datetime.now(UTC).date() - self.built).days

    def words(self) -> str:
        age = "of an unknown day" if self.built is None else f"of {self.built}, {self.age_days} days old"
        return f"{self.component} {self.version}, {age}"

    def told(self) -> dict[str, Any]:
        """For a report, as JSON."""
        built = None if self.built is None else self.built.isoformat()
        return {
            "name": self.name,
            "component": self.component,
            "version": self.version,
            "built": built,
            "age_days": self.age_days,
            "known_bad": [asdict(fault) for fault in self.faults],
        }


def parts(driver: str, vmm: Path, version: str, tier: Tier, kernel: Path | None) -> list[Part]:
    """What runs a sandbox on this host. kernel: of guests, a bzImage; None: there is none yet. Blocking; milliseconds."""
    found = [_vmm(driver, vmm, version), _host_kernel()]
    if driver == "qemu":
        found += _firmware()
    if kernel is not None:
        found += _guest_kernel(kernel)
    return [judged(part, tier) for part in found]


def faults_of(component: str, version: str) -> tuple[Fault, ...]:
    """What is known to be wrong with that version of a VMM."""
    return judged(Part("VMM", component, version, compared=version), Tier.KVM).faults


def as_of() -> str:
    """The day up to which the list of known faults was brought."""
    return str(_known()["as_of"])


def judged(part: Part, tier: Tier) -> Part:
    found = (entry for entry in _known()["entries"] if _concerns(entry, part, tier))
    faults = tuple(Fault(entry["date"], entry["id"], entry["sentence"]) for entry in found)
    return Part(part.name, part.component, part.version, part.built, part.compared, faults)


def worse(found: Iterable[Part]) -> list[str]:
    """In words, the parts that are known to be bad."""
    return [
        f"{part.name}: {part.component} {part.version} has a known fault, {fault}"
        for part in found
        for fault in part.faults
    ]


def _concerns(entry: dict[str, Any], part: Part, tier: Tier) -> bool:
    if entry["component"] != part.component or part.name not in entry.get("parts", (part.name,)):
        return False
    if entry.get("tier", tier) != tier:
        return False
    before = entry.get("built_before")
    if before is not None and part.built is not None and part.built < date.fromisoformat(before):
        return True
    return any(_within(part.compared, first, fixed) for first, fixed in entry["ranges"])


def _within(version: str | None, first: str, fixed: str) -> bool:
    return version is not None and _numbers(first) <= _numbers(version) < _numbers(fixed)


def _numbers(version: str) -> tuple[int, ...]:
    """What a version is compared by: 7.2 comes before 7.2.1. Words behind the numbers don't count."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@cache
def _known() -> dict[str, Any]:
    told: dict[str, Any] = json.loads((resources.files("instavm.node") / "known_bad.json").read_text())
    return told


def _vmm(driver: str, program: Path, version: str) -> Part:
    return Part("VMM", driver, version, _file_date(program), version)


def _firmware() -> list[Part]:
    for file in FIRMWARE:
        if file.exists():
            told = re.search(rb"(\d+\.\d+\.\d+)-[\w.+-]*\d", file.read_bytes())
            version = told[0].decode() if told else "without a version"
            return [Part("firmware", "seabios" if told else "qboot", version, _file_date(file.resolve()))]
    return []


def _host_kernel() -> Part:
    return _kernel("host kernel", platform.release(), f"{platform.release()} {platform.version()}")


def _guest_kernel(bzimage: Path) -> list[Part]:
    """Its header says where it calls itself something (Documentation/arch/x86/boot.rst of the kernel: kernel_version)."""
    try:
        with bzimage.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError:  # removed since: sandboxes that were restored need it no more
        return []
    if header[0x202:0x206] != b"HdrS":
        return []
    at = struct.unpack_from("<H", header, 0x20E)[0] + 0x200
    told = header[at : at + 300].split(b"\0")[0].decode(errors="replace")
    return [_kernel("guest kernel", told.split(" ")[0], told)]


def _kernel(name: str, release: str, told: str) -> Part:
    upstream = _UPSTREAM.search(told)
    plain = re.match(r"\d+\.\d+(\.\d+)?", release)
    compared = None
    if upstream is not None:
        compared = upstream[1]
    elif plain is not None and not _DISTRIBUTIONS.match(release):
        compared = plain[0]
    return Part(name, "linux", release if upstream is None else f"{release} ({upstream[1]})", _date_in(told), compared)


def _date_in(told: str) -> date | None:
    found = _DATE.search(told)
    if found is None:
        return None
    try:
        if found[1]:
            return date.fromisoformat(found[1])
        return datetime.strptime(f"{found[2]} {found[3]} {found[4]} +0000", "%b %d %Y %z").date()
    except ValueError:
        return None


def _file_date(file: Path) -> date | None:
    """Packages keep the day on which a file was made."""
    try:
        return datetime.fromtimestamp(file.stat().st_mtime, UTC).date()
    except OSError:
        return None
