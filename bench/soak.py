"""Create, execute, kill, again and again: does anything grow in the server, or stay on the host?

    python bench/soak.py [--cycles 1000] [--warm-up 1000] [--json FILE]

After the warm-up, and after every tenth of the cycles, the memory of the server's processes, descriptors and threads are taken
down; at the end, what is left of sandboxes on the host, which has to be nothing. The warm-up is long because of one step:
CPython's table of interned strings, through which every path of a sandbox goes, grows once by 1.9 MiB in the first thousand.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, server
from instavm.node import inventory
from instavm.settings import Settings


def cycle() -> None:
    with InstaVM(KEY, memory_mb=256) as vm:
        assert vm.execute("print(6 * 7)").stdout == "42\n"


def settled(process: psutil.Process) -> None:
    """Machines are made ahead for the next sandbox; a server is compared with itself only when they are all there."""
    wanted = Settings().spare_machines
    while sum(one.name().startswith("qemu-system") for one in process.children(recursive=True)) != wanted:
        time.sleep(0.05)
    time.sleep(1)  # connections and worker threads that are not used any more go by themselves


def taken(process: psutil.Process) -> dict[str, float]:
    settled(process)
    others = [one for one in process.children(recursive=True) if one.name().startswith("python")]
    return {
        "rss_mib": round(process.memory_info().rss / (1 << 20), 2),
        "others_rss_mib": round(sum(one.memory_info().rss for one in others) / (1 << 20), 2),
        "fds": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
    }


def measured(cycles: int, warm_up: int) -> dict[str, Any]:
    for _ in range(warm_up):
        cycle()
    process = psutil.Process(int(Settings().server_lock.read_text()))
    points = [{"cycles": 0, **taken(process)}]
    began = time.perf_counter()
    for number in range(1, cycles + 1):
        cycle()
        if number % max(1, cycles // 10) == 0:
            points.append({"cycles": number, **taken(process)})
            print(points[-1], flush=True)
    took_s = time.perf_counter() - began
    return {"cycles": cycles, "ms_per_cycle": round(took_s / cycles * 1000, 1), "points": points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "soak.json")
    asked = parser.parse_args()
    facts = report.machine()
    with server(spare_machines_max=Settings().spare_machines):
        state_dir = Settings().state_dir
        results = measured(asked.cycles, asked.warm_up)
    left = inventory.take(state_dir)
    results["left_over"] = {"processes": len(left.processes), "folders": len(left.homes)}
    asked.json.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    first, last = results["points"][0], results["points"][-1]
    for name in ("rss_mib", "others_rss_mib", "fds", "threads", "children"):
        print(f"{name:10} {first[name]} -> {last[name]}")
    print(f"left over  {results['left_over']}")


if __name__ == "__main__":
    main()
