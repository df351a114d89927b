"""How fast answers come: round trips, the first byte of streamed output, and 100 MB of it with the memory that the server needs.

Through the whole stack, on one sandbox. "Streamed": the guest prints its clock, which is compared with the host's when the
event is read. By how much the two differ is taken from the fastest of many round trips; half of that round trip is the error.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from instavm.bench import memory, report
from instavm.bench.host import KEY, SETTLED_S, server
from instavm.bench.timing import repeated_ms
from instavm.client.sync import InstaVM
from instavm.settings import Settings

MEGABYTES: Final = 100
FLOODS: Final = 5
"""Each takes seconds: at most so many."""
CELLS: Final = (
    ("python", "print(1)"),
    ("python", "1 + 1"),
    ("python", "1 / 0"),
    ("python", "%who_ls"),
    ("python", "await asyncio.sleep(0)"),
    ("javascript", "1 + 1"),
    ("bash", "echo 1"),
)
APART_S: Final = 0.05
"""Between two prints that are streamed."""
CLOCKS: Final = 50
"""Round trips for the difference of the clocks."""


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """`count` calls of each cell, and prints of each kind. Raises: as the client does."""
    with server() as settings, InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib, timeout=86_400) as vm:
        times = {**round_trips(vm, count), **first_bytes(vm, count)}
        return {**{name: report.spread(found) for name, found in times.items()}, **floods(vm, count, settings)}


def round_trips(vm: InstaVM, count: int) -> dict[str, list[float]]:
    vm.execute("import asyncio")
    time.sleep(SETTLED_S)
    return {
        f"round trip: {language}, {code}": repeated_ms(count, partial(vm.execute, code, language=language))
        for language, code in CELLS
    }


def first_bytes(vm: InstaVM, count: int) -> dict[str, list[float]]:
    """Milliseconds from the guest's print to our event, for a line and for text without a newline."""
    times: dict[str, list[float]] = {}
    behind_s = clock_difference_s(vm)
    for name, end in (("a line", "'\\n'"), ("no newline", "' '")):
        code = f"import time\nfor _ in range({count}):\n    time.sleep({APART_S})\n    print(time.time(), end={end})"
        times[f"streamed: print of {name} to event"] = [
            (time.time() - float(event.text.split()[0]) - behind_s) * 1000
            for event in vm.stream(code)
            if event.type == "stdout"
        ]
    return times


def clock_difference_s(vm: InstaVM) -> float:
    """How far the guest's clock is behind ours."""
    found = []
    for _ in range(CLOCKS):
        began = time.time()
        guest = float(vm.execute("import time; print(time.time())").stdout)
        ended = time.time()
        found.append((ended - began, (began + ended) / 2 - guest))
    return min(found)[1]


def floods(vm: InstaVM, count: int, settings: Settings) -> report.Results:
    """Output without a newline: how long until the result, and what the server's processes have at their peak."""
    code = f"import os\nfor _ in range({MEGABYTES}): os.write(1, b'x' * 1_000_000);"

    def flood() -> None:
        if not vm.execute(code).truncated:
            raise RuntimeError(f"{MEGABYTES} MB of output came whole")

    name = f"{MEGABYTES} MB of stdout"
    with memory.peaks(settings) as found:
        times = repeated_ms(min(count, FLOODS), flood, uncounted=0)
    return {name: report.spread(times), f"{name}: memory of the server": {**found, "n": len(times)}}
