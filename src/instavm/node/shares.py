"""Who takes much of the CPU gives way to who takes little.

Control groups give each sandbox its part of a busy host; but one that asks for something small once in a while waits for its
part like those that would take all they get. So a sandbox that has taken about an equal part of late, or more, runs only when
those that took less don't want to (`cpu.idle`). It is not starved by them: who takes as much as it does is one of its kind.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from instavm.node.jail.cgroups import Cgroups

EVERY_S: Final = 0.5
MEMORY_S: Final = 2.0
"""Over how long the use of the CPU is averaged."""
ACTIVE_CPUS: Final = 0.02
"""Who uses less is not counted among those who share the host."""
BUSY_PART, CALM_PART = 0.8, 0.5
"""Of an equal part: above the first a sandbox gives way, below the second no more."""
TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(slots=True, eq=False)
class Use:
    """One sandbox's, of late. `used_s`: CPU seconds since it began."""

    vcpus: int
    used_s: float
    cpus: float = 0.0
    gives_way: bool = False

    def saw(self, used_s: float, within_s: float) -> None:
        self.cpus += min(1.0, within_s / MEMORY_S) * ((used_s - self.used_s) / within_s - self.cpus)
        self.used_s = used_s


def changed(uses: Mapping[str, Use]) -> list[str]:
    """Those who give way from now on, or no more; `gives_way` says which. Equal parts are those of what all take together."""
    active = [use for use in uses.values() if use.cpus > ACTIVE_CPUS]
    each = sum(use.cpus for use in active) / max(1, sum(use.vcpus for use in active))
    found = []
    for name, use in uses.items():
        part = use.vcpus * each * (CALM_PART if use.gives_way else BUSY_PART)
        busy = len(uses) > 1 and use in active and use.cpus > part
        if busy != use.gives_way:
            use.gives_way = busy
            found.append(name)
    return found


async def watch(cgroups: Cgroups, running: Callable[[], Mapping[str, int]]) -> None:
    """For ever. running: machines, and their VMMs' processes."""
    uses: dict[str, Use] = {}
    last = anyio.current_time()
    while True:
        await anyio.sleep(EVERY_S)
        now, known, uses = anyio.current_time(), uses, {}
        for machine, pid in running().items():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it is gone, or just going
                used_s = cpu_s(pid)
                uses[machine] = use = known.get(machine) or Use(cgroups.vcpus(machine), used_s)
                use.saw(used_s, now - last)
        for machine in changed(uses):
            with contextlib.suppress(FileNotFoundError):
                cgroups.idle(machine, uses[machine].gives_way, uses[machine].vcpus)
        last = now


def cpu_s(pid: int) -> float:
    """CPU time of a process and all its threads. Raises FileNotFoundError, ProcessLookupError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S
