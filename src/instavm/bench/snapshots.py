"""Suspend, resume, fork, snapshot, as a node does them without HTTP around it; times until the first result.

Of a sandbox that has written nothing, and of one that has filled memory, in turns.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import anyio

from instavm.bench import report
from instavm.bench.host import tell_probe
from instavm.bench.memory import private_mib
from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec, Started
from instavm.errors import InstaVMError
from instavm.node.runtime import Runtime
from instavm.settings import Settings

T = TypeVar("T")

WRITTEN_MIB: Final = (0, 100)
FORKS: Final = (1, 8)
"""How many at one time."""
SETTLED_S: Final = 1.0
"""The spare machine that is made after each start is none of what is measured."""
PRINT: Final = Command("print(6 * 7)", "python", 60)


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """`count` rounds with each of WRITTEN_MIB. Raises: as the node does."""
    return anyio.run(_measure, count, vcpus, memory_mib)


async def _measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    found = {mib: Found() for mib in WRITTEN_MIB}
    with tempfile.TemporaryDirectory(prefix="ivm-bench-") as folder:
        tell_probe(Settings().state_dir, Path(folder) / "state")
        settings = Settings(state_dir=Path(folder) / "state", spare_machines=1, spare_machines_max=1)
        async with Runtime.open(settings) as node:
            first = Source(node, "vm-first", vcpus, memory_mib)  # its template is made now, if it was not there
            await first.start()
            await node.stop(first.vm_id)
            for number in range(count):
                for mib in WRITTEN_MIB:
                    source = Source(node, f"vm-{number}-{mib}", vcpus, memory_mib)
                    await one_round(source, mib, found[mib])
    results: dict[str, dict[str, float]] = {}
    for mib, of in found.items():
        label = f" [{mib} MiB written]" if mib else ""
        results |= {name + label: report.spread(times) for name, times in of.ms.items()}
        results |= {name + label: report.spread(sizes, "mib") for name, sizes in of.mib.items()}
    return results


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured → its times in ms, its sizes in MiB."""

    ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    mib: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    async def timed(self, name: str, work: Awaitable[T]) -> T:
        """work: not yet begun."""
        began = time.perf_counter()
        done = await work
        self.ms[name].append((time.perf_counter() - began) * 1000)
        return done


@dataclass(frozen=True, slots=True)
class Source:
    """The sandbox that is copied and put to rest."""

    node: Runtime
    vm_id: str
    vcpus: int
    memory_mib: int

    def spec(self, vm_id: str, resumes: str | None = None) -> SandboxSpec:
        return SandboxSpec(vm_id, self.vcpus, self.memory_mib, resumes=resumes)

    async def start(self) -> None:
        await self.node.start(self.spec(self.vm_id))
        await answers(self.node, self.vm_id)

    async def fork(self, names: Sequence[str]) -> None:
        """Returns when each of them has answered."""
        made: Sequence[Started | InstaVMError] = await self.node.fork(self.vm_id, [self.spec(name) for name in names])
        for one in made:
            if not isinstance(one, Started):
                raise one
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(answers, self.node, name)

    async def resume(self, vm_id: str) -> None:
        await self.node.start(self.spec(vm_id, resumes=self.vm_id))
        await answers(self.node, vm_id)


async def one_round(source: Source, mib: int, found: Found) -> None:
    node, vm_id = source.node, source.vm_id
    await source.start()
    if mib:
        await node.execute(vm_id, Command(f"import os; data = os.urandom({mib} << 20)", "python", 60))
    await anyio.sleep(SETTLED_S)
    for count in FORKS:
        names = [f"{vm_id}-fork{count}-{child}" for child in range(count)]
        await found.timed(f"fork({count}) → result of each", source.fork(names))
        if count == max(FORKS):
            found.mib["memory of a fork after its first result"] += [private_mib(node.pid_of(name)) for name in names]
        for name in names:
            await node.stop(name)
    found.ms["pause of the source: fork"].append(node.last_pause_ms)
    disk, again = f"snap-{vm_id}", f"{vm_id}-again"
    stored = await found.timed("snapshot of the disk", node.snapshot(vm_id, disk))
    found.ms["pause of the source's disk: snapshot"].append(stored.pause_ms)
    stored = await found.timed("suspend", node.suspend(vm_id))
    found.mib["a suspended sandbox on disk"].append(stored.own_bytes / 2**20)
    await found.timed("resume → result", source.resume(again))
    await node.stop(again)
    for name in (vm_id, disk):
        await node.forget(name)


async def answers(node: Runtime, vm_id: str) -> None:
    outcome = await node.execute(vm_id, PRINT)
    if outcome.stdout != "42\n":
        raise RuntimeError(f"sandbox {vm_id} answered {outcome.stdout!r}")
