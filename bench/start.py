"""How long a sandbox takes: from the client's constructor to the result of its first execute, step by step.

    python bench/start.py [--sandboxes 30] [--vcpus 2] [--memory 512] [--json FILE]

Through the whole stack: SDK, HTTP, API, control, node, VMM, agent. Nothing of a guest is restored ahead of a request; with
spare machines an empty VMM process waits (requests come 1.5 s apart there, so that there is one), without them it is started
within the measured time, back to back. With warm machines
(`INSTAVM_WARM_MACHINES`) a sandbox was restored ahead and waits paused; requests come 2 s apart there. In the same run, for
comparison: the same image booted cold, and a new `python3 -c` on the host as the floor.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, server
from instavm.settings import Settings

SETTLED_S = 4.0
"""After a start the node makes spare machines in the quiet that follows; round trips are measured when that is over."""


def starts(count: int, vcpus: int, memory_mib: int, *, apart_s: float = 0.0) -> dict[str, list[float]]:
    """Times in ms of `count` sandboxes, one after the other, each ended `apart_s` seconds before the next begins."""
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(count + 2):
        time.sleep(apart_s)
        began = time.perf_counter()
        with InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib) as vm:
            constructed = time.perf_counter()
            result = vm.execute("print(1)")
            done = time.perf_counter()
            assert result.stdout == "1\n", result
            steps = vm.get_session_info()["start"]["steps_ms"]
        if number < 2:
            continue  # the first finds no spare machine, and may boot the template
        times["start: constructor to first result"].append((done - began) * 1000)
        times["  constructor returns"].append((constructed - began) * 1000)
        for name, ms in steps.items():
            times[f"  node: {name.replace('_', ' ')}"].append(ms)
        times["  first execute, API and all else"].append((done - began) * 1000 - sum(steps.values()))
    return times


def jail_share(count: int, vcpus: int, memory_mib: int, rounds: int = 3) -> dict[str, dict[str, float]]:
    """The same starts with the jail and with `INSTAVM_JAIL=off`, in turns, no machine made ahead: there it costs most."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for jail in ("on", "off"):
            with server(spare_machines=0, jail=jail):
                found = starts(count // rounds, vcpus, memory_mib)
            for step in ("start: constructor to first result", "  node: machine"):
                times[f"in turns, no spare machine, jail {jail}, {step.strip()}"] += found[step]
    return {name: report.spread(values) for name, values in times.items()}


def round_trips(count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    with InstaVM(KEY) as vm:
        vm.execute("print(1)")
        time.sleep(SETTLED_S)
        for language, code in (("python", "print(1)"), ("bash", "echo 1")):
            for number in range(count + 10):
                began = time.perf_counter()
                vm.execute(code, language=language)
                if number >= 10:
                    times[f"round trip: {language}, {code}"].append((time.perf_counter() - began) * 1000)
    return times


def templates_made(count: int, vcpus: int, memory_mib: int) -> dict[str, list[float]]:
    """Boot, warm up and save a template, in a cache of its own that shares images and kernels with the machine's."""
    times: dict[str, list[float]] = defaultdict(list)
    shared = Settings().cache_dir
    for _ in range(count):
        with tempfile.TemporaryDirectory(prefix="ivm-bench-cache-") as cache:
            for name in ("kernels", "guests", "images", "bases"):
                (Path(cache) / name).symlink_to(shared / name)
            with server(cache_dir=cache), InstaVM(KEY, cpu_count=vcpus, memory_mb=memory_mib) as vm:
                vm.execute("print(1)")
                start = vm.get_session_info()["start"]
                assert start["cold"]
                times["cold: boot, warm up and save a template"].append(start["steps_ms"]["template"])
            shutil.rmtree(f"{cache}/templates", ignore_errors=True)
    return times


def floor(count: int) -> dict[str, list[float]]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run(["/usr/bin/python3", "-c", "print(1)"], check=True, capture_output=True)
        times.append((time.perf_counter() - began) * 1000)
    return {"floor: python3 -c on the host": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandboxes", type=int, default=30)
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--memory", type=int, default=512)
    parser.add_argument("--cold", type=int, default=3, help="how many templates to boot for the comparison")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "start.json")
    asked = parser.parse_args()
    facts = {**report.machine(), "vcpus": asked.vcpus, "sandbox_memory_mib": asked.memory}
    results: dict[str, dict[str, float]] = {}
    with server():
        for name, times in starts(asked.sandboxes, asked.vcpus, asked.memory, apart_s=1.5).items():
            results[name] = report.spread(times)
        for name, times in round_trips(100).items():
            results[name] = report.spread(times)
    with server(spare_machines=0):
        for name, times in starts(asked.sandboxes, asked.vcpus, asked.memory).items():
            results[f"back to back, no spare machine, {name.strip()}"] = report.spread(times)
    results |= jail_share(asked.sandboxes, asked.vcpus, asked.memory)
    with server(warm_machines=3):
        for name, times in starts(asked.sandboxes, asked.vcpus, asked.memory, apart_s=2.0).items():
            results[f"warm machines, {name.strip()}"] = report.spread(times)
    for name, times in (*templates_made(asked.cold, asked.vcpus, asked.memory).items(), *floor(30).items()):
        results[name] = report.spread(times)
    report.finish(asked.json, facts, results)


if __name__ == "__main__":
    main()
