"""How long calls take while one part of the server stands still (SIGSTOP).

    python bench/stopped_parts.py [--rounds 20] [--json FILE]

In each round one part is stopped: the VMM of one sandbox, the egress filter, or the node's process. Meanwhile a client lists its
VMs, gets one, runs a command in another sandbox, starts a sandbox, and kills one. With the node stopped nothing can run, so only
the list, the get and the kill are measured then.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, SETTLED_S, server
from instavm.node import inventory
from instavm.settings import Settings

FILTER = "instavm.node.network.filter"


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed, or replaced
            os.kill(pid, signal.SIGCONT)


def part(name: str, settings: Settings, vm_id: str) -> int:
    """The process of a part of the server."""
    node = int(settings.server_lock.read_text())
    if name == "node":
        return node
    if name == "filter":
        return next(one.pid for one in psutil.Process(node).children(recursive=True) if FILTER in one.cmdline())
    machines = settings.state_dir / "machines"
    for home, pid in inventory.running(machines).items():
        note = machines / home / "sandbox.json"
        if note.exists() and vm_id in note.read_text():
            return pid
    raise LookupError(f"{vm_id} has no VMM")


def measure(name: str, settings: Settings, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)

    def timed(what: str, call: Callable[[], object]) -> None:
        began = time.perf_counter()
        call()
        times[what].append((time.perf_counter() - began) * 1000)

    def start() -> None:
        with InstaVM(KEY) as third:
            third.execute("1")

    for _ in range(rounds):
        still, other = InstaVM(KEY), InstaVM(KEY)
        for client in (still, other):
            client.execute("1")
        vm_id = str(still.get_session_status()["vm_id"])
        time.sleep(1.0)  # the next spare machine is made in this time
        with stopped(part(name, settings, vm_id)):
            timed("list", other.vms.list)
            timed("get", lambda: other.vms.get(vm_id))  # noqa: B023 (called at once)
            if name != "node":
                timed("execute in another sandbox", lambda: other.execute("1"))  # noqa: B023
                timed("start, execute and end of a third", start)
            timed("kill", still.kill)
        other.kill()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "stopped_parts.json")
    asked = parser.parse_args()
    facts = report.machine()
    results: dict[str, dict[str, float]] = {}
    with server() as settings, InstaVM(KEY) as first:
        first.execute("1")
        time.sleep(SETTLED_S)
        for name in ("vmm", "filter", "node"):
            for what, times in measure(name, settings, asked.rounds).items():
                results[f"{name} stopped: {what}"] = report.spread(times)
    report.finish(asked.json, facts, results)


if __name__ == "__main__":
    main()
