"""Suspend, resume, fork, snapshot: `python bench/snapshots.py`. A node without HTTP around it; times until the first result."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from instavm.bench import report
from instavm.node.runtime import Runtime
from instavm.sandbox import Command, SandboxSpec, Started
from instavm.settings import Settings

PRINT = Command("print(1)", "python", 60)
FILL = Command("import os; data = os.urandom({mib} << 20); print(len(data))", "python", 60)


class Times:
    def __init__(self) -> None:
        self.ms: dict[str, list[float]] = {}

    def add(self, name: str, ms: float) -> None:
        self.ms.setdefault(name, []).append(ms)

    async def of(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        began = time.perf_counter()
        await work()
        self.add(name, (time.perf_counter() - began) * 1000)


async def measure(rounds: int, mib: int, times: Times) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="ivm-bench-") as folder:
        settings = Settings(state_dir=Path(folder) / "s", spare_machines=1)
        async with Runtime.open(settings) as node:
            extra: dict[str, float] = {}
            await node.start(SandboxSpec("vm-warm", 2, 512))  # its template is made now, if it was not there
            await node.execute("vm-warm", PRINT)
            await node.stop("vm-warm")
            for number in range(rounds):
                await one_round(node, number, mib, times, extra)
            return extra


async def one_round(node: Runtime, number: int, mib: int, times: Times, extra: dict[str, float]) -> None:
    name = f"vm-{number}"
    await node.start(SandboxSpec(name, 2, 512))
    await node.execute(name, PRINT)
    if mib:
        await node.execute(name, Command(FILL.code.format(mib=mib), "python", 60))
    await anyio.sleep(1.0)  # the spare machine that is made after each start is none of this

    for count in (1, 8):
        specs = [SandboxSpec(f"{name}-fork{count}-{child}", 2, 512) for child in range(count)]

        async def fork(specs: list[SandboxSpec] = specs) -> None:
            made = await node.fork(name, specs)
            assert all(isinstance(one, Started) for one in made), made
            async with anyio.create_task_group() as tasks:
                for spec in specs:
                    tasks.start_soon(node.execute, spec.vm_id, PRINT)

        await times.of(f"fork({count}) → result of each", fork)
        if count == 8:
            private = [private_mib(node, spec.vm_id) for spec in specs]
            extra["memory of a fork after its first result, MiB"] = round(sum(private) / len(private), 1)
        for spec in specs:
            await node.stop(spec.vm_id)
    times.add("pause of the source: fork", node.last_pause_ms)

    async def snapshot() -> None:
        times.add("pause of the source's disk: snapshot", (await node.snapshot(name, f"snap-{number}")).pause_ms)

    await times.of("snapshot of the disk", snapshot)

    async def suspend() -> None:
        stored = await node.suspend(name)
        extra["a suspended sandbox on disk, MiB"] = round(stored.own_bytes / 2**20, 1)

    await times.of("suspend", suspend)
    again = f"{name}-again"

    async def resume() -> None:
        await node.start(SandboxSpec(again, 2, 512, resumes=name))
        await node.execute(again, PRINT)

    await times.of("resume → result", resume)
    await node.stop(again)
    for one in (name, f"snap-{number}"):
        await node.forget(one)


def private_mib(node: Runtime, vm_id: str) -> float:
    """What a sandbox's process has for itself alone."""
    lines = Path(f"/proc/{node.pid_of(vm_id)}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fill", type=int, nargs="*", default=[0, 100], help="MiB written by the sandbox before")
    asked = parser.parse_args()
    facts = report.machine()
    results: dict[str, dict[str, float]] = {}
    for mib in asked.fill:
        times = Times()
        extra = anyio.run(measure, asked.rounds, mib, times)
        label = f" [{mib} MiB written]" if mib else ""
        results |= {name + label: report.spread(ms) for name, ms in times.ms.items()}
        for name, value in extra.items():
            print(f"  {name + label:60} {value}")
        facts |= {name + label: value for name, value in extra.items()}
    report.finish(Path(__file__).with_name("results") / "snapshots.json", facts, results)


if __name__ == "__main__":
    main()
