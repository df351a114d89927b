"""Time to interactive: from the client's constructor to the result of its first execute, as people start sandboxes.

One after the other; 200 ms apart, whether or not the last one is ready; all at once.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from instavm.bench import report
from instavm.bench.host import KEY, MEMORY_OVERCOMMIT, SETTLED_S, server
from instavm.client.sync import InstaVM

STAGGER_S: Final = 0.2
PAUSE_S: Final = 1.5
"""Between sandboxes that come one after the other: long enough that the node has made ready for the next one."""


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """Raises: whatever a sandbox that does not come up raises; one of a burst that fails fails the bench."""
    with server(memory_overcommit=MEMORY_OVERCOMMIT):
        first_result(vcpus, memory_mib)  # the first of a size may have to boot its template
        alone = []
        for _ in range(count):
            time.sleep(PAUSE_S)
            alone.append(first_result(vcpus, memory_mib))
        time.sleep(SETTLED_S)
        apart = together(count, vcpus, memory_mib, STAGGER_S)
        time.sleep(SETTLED_S)
        at_once = together(count, vcpus, memory_mib, 0.0)
    times = {"one after the other": alone, "200 ms apart": apart, "all at once": at_once}
    return {name: report.spread(found) for name, found in times.items()}


def first_result(vcpus: int, memory_mib: int, done: threading.Barrier | None = None) -> float:
    """Milliseconds. `done`: everybody's sandboxes end only when all have answered."""
    began = time.perf_counter()
    with InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib) as vm:
        told = vm.execute("print(6 * 7)").stdout
        took_ms = (time.perf_counter() - began) * 1000
        if told != "42\n":
            raise RuntimeError(f"a sandbox answered {told!r}")
        if done is not None:
            done.wait()
    return took_ms


def together(count: int, vcpus: int, memory_mib: int, apart_s: float) -> list[float]:
    """Each in a thread of its own, begun `apart_s` seconds after the one before."""
    times: list[float] = []
    failed: list[BaseException] = []
    done = threading.Barrier(count)

    def one() -> None:
        try:
            times.append(first_result(vcpus, memory_mib, done))
        except BaseException as exc:  # handed on below, in the thread that asked
            failed.append(exc)
            done.abort()

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
        time.sleep(apart_s)
    for thread in threads:
        thread.join()
    if failed:
        raise next((exc for exc in failed if not isinstance(exc, threading.BrokenBarrierError)), failed[0])
    return times
