"""The memory of this host."""

from __future__ import annotations

import os
from pathlib import Path

from instavm.contract.host import HostMemory


def total_mib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def now() -> HostMemory:
    """What the kernel says now (/proc/meminfo)."""
    said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(said[name].split()[0]) >> 10 for name in ("MemTotal", "MemAvailable"))
    return HostMemory(total, available)
