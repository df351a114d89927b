"""How long a sandbox takes: from the client's constructor to the result of its first execute, step by step.

Through the whole stack: SDK, HTTP, API, control, node, VMM, agent. Nothing of a guest is restored ahead of a request; with
spare machines an empty VMM process waits (requests come apart there, so that there is one), without them it is started
within the measured time, back to back. With warm machines (`INSTAVM_WARM_MACHINES`) a sandbox was restored ahead, and waits.
In the same run: what the jail takes of it, the first sandbox of a size, whose template is booted, and a new `python3 -c` on
the host as the floor.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from instavm.bench import report
from instavm.bench.host import KEY, server
from instavm.bench.interactive import PAUSE_S
from instavm.bench.timing import FLOOR, floor_ms
from instavm.client.sync import InstaVM
from instavm.settings import Settings

WHOLE: Final = "start: constructor to first result"
MACHINE: Final = "  node: machine"
COLD: Final = "cold: boot, warm up and save a template"
WARM_PAUSE_S: Final = 2.0
"""Between sandboxes that find a warm machine: another one is restored and warmed up meanwhile."""
WARM_MACHINES: Final = 3
UNCOUNTED: Final = 2
"""The first finds no machine made ahead, and may boot the template."""
JAILS: Final = ("on", "off")
TURNS: Final = 3
"""How often the jail is put up and taken away: each time is a server of its own."""
COLDS: Final = 3
"""A template takes half a minute: at most so many."""

Times = dict[str, list[float]]


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """`count` starts of each kind. Raises: whatever a sandbox that does not come up raises."""
    size = (vcpus, memory_mib)
    times: Times = {}
    with server():
        times |= starts(count, size, PAUSE_S)
    with server(spare_machines=0):
        times |= _called("back to back, no spare machine", starts(count, size))
    times |= jail_share(count, size)
    with server(warm_machines=WARM_MACHINES):
        times |= _called("warm machines", starts(count, size, WARM_PAUSE_S))
    times |= templates_made(min(count, COLDS), size)
    times[FLOOR] = [floor_ms() for _ in range(count)]
    return {name: report.spread(found) for name, found in times.items() if found}


def starts(count: int, size: tuple[int, int], apart_s: float = 0.0) -> Times:
    """Times in ms of `count` sandboxes, one after the other, each ended `apart_s` seconds before the next begins."""
    times: Times = defaultdict(list)
    vcpus, memory_mib = size
    for number in range(UNCOUNTED + count):
        time.sleep(apart_s)
        began = time.perf_counter()
        with InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib) as vm:
            constructed = time.perf_counter()
            told = vm.execute("print(6 * 7)").stdout
            done = time.perf_counter()
            if told != "42\n":
                raise RuntimeError(f"a sandbox answered {told!r}")
            steps: Mapping[str, float] = vm.get_session_info()["start"]["steps_ms"]
        if number < UNCOUNTED:
            continue
        times[WHOLE].append((done - began) * 1000)
        times["  constructor returns"].append((constructed - began) * 1000)
        for name, ms in steps.items():
            times[f"  node: {name.replace('_', ' ')}"].append(ms)
        times["  first execute, API and all else"].append((done - began) * 1000 - sum(steps.values()))
    return times


def jail_share(count: int, size: tuple[int, int]) -> Times:
    """The same starts with the jail and with `INSTAVM_JAIL=off`, in turns, no machine made ahead: there it costs most."""
    times: Times = defaultdict(list)
    for turn in range(min(count, TURNS)):
        for jail in JAILS:
            with server(spare_machines=0, jail=jail):
                found = starts(len(range(turn, count, TURNS)), size)
            for step in (WHOLE, MACHINE):
                times[f"in turns, no spare machine, jail {jail}, {step.strip()}"] += found[step]
    return times


def templates_made(count: int, size: tuple[int, int]) -> Times:
    """Boot, warm up and save a template, in a cache of its own that shares images and kernels with the machine's."""
    times: Times = defaultdict(list)
    vcpus, memory_mib = size
    shared = Settings().cache_dir
    for _ in range(count):
        with tempfile.TemporaryDirectory(prefix="ivm-bench-cache-") as cache:
            for name in ("kernels", "guests", "images", "bases"):
                (Path(cache) / name).symlink_to(shared / name)
            with server(cache_dir=cache), InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib) as vm:
                vm.execute("print(1)")
                start = vm.get_session_info()["start"]
                if not start["cold"]:
                    raise RuntimeError("a template was there before the first sandbox of its size")
                times[COLD].append(start["steps_ms"]["template"])
    return times


def _called(kind: str, times: Times) -> Times:
    return {f"{kind}, {name.strip()}": found for name, found in times.items()}
