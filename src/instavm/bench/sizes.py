"""How a start grows with what is asked for: memory, then vCPUs."""

from __future__ import annotations

import time
from typing import Final

from instavm.bench import report
from instavm.bench.host import MEMORY_OVERCOMMIT, server
from instavm.bench.interactive import PAUSE_S, first_result

MEMORY_MIB: Final = (256, 512, 1024, 2048, 4096, 8192)
VCPUS: Final = (1, 2, 4, 8)


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """`count` starts of every memory size with `vcpus`, and of every number of vCPUs with `memory_mib`, in turns."""
    sizes = [(vcpus, memory) for memory in MEMORY_MIB] + [(each, memory_mib) for each in VCPUS if each != vcpus]
    times: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    with server(memory_overcommit=MEMORY_OVERCOMMIT):
        for size in sizes:
            first_result(*size)  # may boot its template
        for _ in range(count):
            for size in sizes:
                time.sleep(PAUSE_S)
                times[size].append(first_result(*size))
    return {f"{cpus} vCPUs, {memory} MB": report.spread(found) for (cpus, memory), found in times.items()}
