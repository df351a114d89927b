"""What one would do otherwise, in turns with us: the same image booted by the same VMM; restored, but from a state that nothing
was done for; a new `python3 -c` on the host as the floor.

The plain ones have no API, no jail and no network device around them, which is in their favour.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import anyio

from instavm.bench import report
from instavm.bench.host import MEMORY_OVERCOMMIT, server, tell_probe
from instavm.bench.interactive import PAUSE_S, first_result
from instavm.bench.timing import FLOOR, floor_ms
from instavm.contract.executions import Command
from instavm.node import identity
from instavm.node.agent import Agent, connected
from instavm.node.images.store import Image, ImageStore
from instavm.node.jail.jail import Jails
from instavm.node.templates import Template, qemu_img
from instavm.node.vmm.base import Driver, Machine, MachineSpec, Saved
from instavm.node.vmm.choose import choose
from instavm.settings import Settings

OURS: Final = "sandbox: from the constructor to the first result"
BOOTED: Final = "plain VMM: cold boot to the first result"
RESTORED: Final = "plain VMM: restored from a saved boot, to the first result"
BOOTS: Final = 5
"""A boot takes many seconds: at most so many, spread over all rounds."""
FIRST: Final = Command("print(6 * 7)", "python", 60)


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """Raises: as what is compared does."""
    with server(memory_overcommit=MEMORY_OVERCOMMIT) as settings:
        return anyio.run(_measure, count, vcpus, memory_mib, settings)


async def _measure(count: int, vcpus: int, memory_mib: int, settings: Settings) -> report.Results:
    times: dict[str, list[float]] = defaultdict(list)
    async with plain(settings.model_copy(update={"jail": "off"}), vcpus, memory_mib) as other:
        await other.keep()
        await anyio.to_thread.run_sync(first_result, vcpus, memory_mib)  # the first of a size may boot its template
        for number in range(count):
            await anyio.sleep(PAUSE_S)
            times[OURS].append(await anyio.to_thread.run_sync(first_result, vcpus, memory_mib))
            times[RESTORED].append(await other.restored())
            if boots_in(number, count):
                times[BOOTED].append(await other.booted())
            times[FLOOR].append(await anyio.to_thread.run_sync(floor_ms))
    results: dict[str, Mapping[str, float]] = {
        name: report.spread(times[name]) for name in (OURS, RESTORED, BOOTED, FLOOR)
    }
    ours = results[OURS]["p50_ms"]
    results["sooner than"] = {
        "cold_boot_times": round(results[BOOTED]["p50_ms"] / ours, 1),
        "plain_restore_times": round(results[RESTORED]["p50_ms"] / ours, 1),
    }
    return results


def boots_in(number: int, count: int) -> bool:
    """Whether this round of `count` is one of those that boot, too."""
    return number * min(count, BOOTS) % count < BOOTS


@dataclass(frozen=True, slots=True)
class Plain:
    """The image on the VMM, without anything of ours but the agent in it, which is needed to hear an answer."""

    driver: Driver
    spec: MachineSpec
    image: Image
    folder: Path
    boot_timeout_s: float

    @property
    def kept(self) -> Saved:
        home = self.folder / "kept"
        return Saved(self.spec, home / "memory", home / "state", (home / "disk.qcow2", self.image.rootfs))

    async def booted(self) -> float:
        """Milliseconds from power on to the first result."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as home:
            async with self._boot(Path(home)) as (_, agent):
                await _answer(agent)
                return (time.perf_counter() - began) * 1000

    async def keep(self) -> None:
        """Boot once, and save it as soon as the agent and its interpreter are there."""
        home = self.folder / "kept"
        home.mkdir()
        async with self._boot(home) as (machine, _):
            await machine.pause()
            await machine.save(self.kept.state)
        await self._disk(home / "blank.qcow2", home / "disk.qcow2", "qcow2")

    async def restored(self, template: Template | None = None) -> float:
        """Milliseconds from nothing to the first result of a machine that goes on where `keep` has saved one, or our template."""
        saved = self.kept if template is None else template.saved
        blank = self.folder / "kept" / "blank.qcow2" if template is None else template.blank
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as home:
            disk = Path(home) / "disk.qcow2"
            shutil.copyfile(blank, disk)
            async with AsyncExitStack() as undo:
                machine = await self.driver.prepare(saved, disk, Path(home), background=False)
                undo.push_async_callback(machine.aclose)
                agent = await undo.enter_async_context(connected(await machine.dial()))
                await machine.load()
                await agent.identify(identity.fresh("plain", {}))
                await _answer(agent)
                return (time.perf_counter() - began) * 1000

    @asynccontextmanager
    async def _boot(self, home: Path) -> AsyncIterator[tuple[Machine, Agent]]:
        disk = home / "disk.qcow2"
        await self._disk(disk, self.image.rootfs, self.image.format)
        saved = Saved(self.spec, home / "memory", home / "state", (self.image.rootfs,))
        machine = await self.driver.boot(saved, disk, home)
        try:
            async with connected(await machine.dial()) as agent:
                await agent.hello(self.boot_timeout_s)
                await agent.configure(dict(self.image.env), self.image.workdir)
                yield machine, agent
        finally:
            await machine.aclose()

    async def _disk(self, disk: Path, backing: Path, backing_format: str) -> None:
        await qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", backing_format, disk)


@asynccontextmanager
async def plain(settings: Settings, vcpus: int, memory_mib: int) -> AsyncIterator[Plain]:
    """On the driver that `settings` choose. Raises: HostNotReady."""
    with tempfile.TemporaryDirectory(prefix="ivm-plain-") as folder:
        tell_probe(settings.state_dir, Path(folder))
        apart = settings.model_copy(update={"state_dir": Path(folder)})
        with Jails.open(apart) as jails:
            driver, _ = await choose(apart, jails)
            try:
                await driver.version()
                images = ImageStore(settings.cache_dir, settings.disk_gib)
                guest = await anyio.to_thread.run_sync(images.ensure_guest)
                image = await anyio.to_thread.run_sync(images.ensure_default)
                spec = MachineSpec(guest.kernel, guest.initrd, guest.system, vcpus, memory_mib)
                yield Plain(driver, spec, image, Path(folder), settings.boot_timeout_s)
            finally:
                driver.close()


async def _answer(agent: Agent) -> None:
    outcome = await agent.execute(FIRST)
    if outcome.stdout != "42\n":
        raise RuntimeError(f"a plain machine answered {outcome.stdout!r}")
