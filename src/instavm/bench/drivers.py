"""The VMMs of this host beside each other, in turns, to the first result: a cold boot, a restore of a boot that was saved, a
restore of our template.

Without API and network, in the jail that each has in production. Where hardware virtualisation works, only those that use it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AsyncExitStack

import anyio

from instavm.bench import baseline, report
from instavm.node.images.store import GuestBase, ImageStore
from instavm.node.templates import Templates
from instavm.node.vmm import choose
from instavm.settings import Settings

SET: Mapping[str, Mapping[str, str]] = {
    "firecracker": {"driver": "firecracker"},
    "qemu-kvm": {"driver": "qemu", "acceleration": "kvm"},
    "qemu-tcg": {"driver": "qemu", "acceleration": "tcg"},
}
"""What has to be set for each of them."""


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """Raises: HostNotReady, BootFailed."""
    return anyio.run(_measure, count, vcpus, memory_mib, Settings())


async def _measure(count: int, vcpus: int, memory_mib: int, settings: Settings) -> report.Results:
    times: dict[str, list[float]] = defaultdict(list)
    guest = await anyio.to_thread.run_sync(ImageStore(settings.cache_dir, settings.disk_gib).ensure_guest)
    async with AsyncExitStack() as opened:
        machines = {
            name: await opened.enter_async_context(
                baseline.plain(settings.model_copy(update=dict(SET[name])), vcpus, memory_mib)
            )
            for name in await _that_work(settings, guest)
        }
        templates = {}
        for name, one in machines.items():
            await one.keep()
            apart = settings.model_copy(update={"state_dir": one.folder})
            templates[name], _ = await Templates(apart, one.driver, guest).get(one.image, vcpus, memory_mib)
        for number in range(count):
            for name, one in machines.items():
                times[f"{name}: restored, to the first result"].append(await one.restored())
                times[f"{name}: template restored, to the first result"].append(await one.restored(templates[name]))
                if baseline.boots_in(number, count):
                    times[f"{name}: cold boot, to the first result"].append(await one.booted())
    return {name: report.spread(values) for name, values in sorted(times.items())}


async def _that_work(settings: Settings, guest: GuestBase) -> list[str]:
    """Those on which a guest boots."""
    if choose.closed() is None:
        found = choose.recorded(settings) or await choose.probe(settings, guest)
        if works := [one.driver for one in found if one.works]:
            return works
    return ["qemu-tcg"]
