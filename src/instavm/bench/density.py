"""Many at once: how starts fare while sandboxes pile up, what each takes while it idles, and whether all still answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final

import psutil

from instavm.bench import report
from instavm.bench.host import KEY, MEMORY_OVERCOMMIT, server
from instavm.bench.memory import private_mib
from instavm.client.sync import InstaVM
from instavm.node import inventory

IDLE_S: Final = 10.0
GROUPS: Final = 5
"""Into how many groups, in order, the starts are divided."""
MIB: Final = 1 << 20


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """`count` sandboxes at one time. Raises: as the client does."""
    results: dict[str, Mapping[str, float]] = {}
    with server(memory_overcommit=MEMORY_OVERCOMMIT) as settings, ExitStack() as alive:
        with InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib) as vm:
            vm.execute("print(1)")  # the template, and what the server needs once
        before = psutil.virtual_memory().available
        clients, times = [], []
        for _ in range(count):
            began = time.perf_counter()
            vm = alive.enter_context(InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib, timeout=3600))
            vm.execute("x = 42")
            times.append((time.perf_counter() - began) * 1000)
            clients.append(vm)
        size = -(-count // GROUPS)
        for start in range(0, count, size):
            group = times[start : start + size]
            results[f"start of sandboxes {start + 1} to {start + len(group)}"] = report.spread(group)
        time.sleep(IDLE_S)
        used = (before - psutil.virtual_memory().available) / MIB
        machines = list(inventory.vmm_processes(settings.state_dir / "machines"))
        results["host memory in use by all of them"] = {"all_mib": round(used), "each_mib": round(used / count, 1)}
        results["private memory of a VMM, idle"] = _private(machines)
        results["CPU of a sandbox, idle"] = _idle(machines)
        answers = []
        for vm in clients:
            began = time.perf_counter()
            if vm.execute("print(x)").stdout != "42\n":
                raise RuntimeError("a sandbox forgot its state")
            answers.append((time.perf_counter() - began) * 1000)
        results[f"answer of each of {count} live sandboxes"] = report.spread(answers)
    return results


def _private(machines: list[psutil.Process]) -> dict[str, float]:
    sizes = sorted(private_mib(machine.pid) for machine in machines)
    return {"p50_mib": round(sizes[len(sizes) // 2], 1), "max_mib": round(sizes[-1], 1), "n": len(sizes)}


def _idle(machines: list[psutil.Process]) -> dict[str, float]:
    def spent() -> float:
        return sum(sum(machine.cpu_times()[:2]) for machine in machines)

    began, at = spent(), time.monotonic()
    time.sleep(IDLE_S)
    share = (spent() - began) / (time.monotonic() - at) / len(machines)
    return {"of_a_core_percent": round(share * 100, 2), "n": len(machines)}
