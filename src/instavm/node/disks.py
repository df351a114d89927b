"""Sandboxes' disks are thin: together they may be larger than the host's. Before that is full, who fills it has to go."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio

FLOOR_BYTES = 256 << 20
"""The server, its database and every other sandbox need some room to go on."""
LOOK_S = 0.5


async def watch(folder: Path, disks: Callable[[], Mapping[str, Path]], end: Callable[[str, str], None]) -> None:
    """For ever: when `folder` runs out of space, end the sandbox that wrote the most of late.

    disks: live sandbox → its disk. end: called with the sandbox and why.
    """
    before: dict[str, int] = {}
    while True:
        await anyio.sleep(LOOK_S)
        now = {name: _taken(disk) for name, disk in disks().items()}
        free = shutil.disk_usage(folder).free
        if now and free < FLOOR_BYTES:
            fastest = max(now, key=lambda name: (now[name] - before.get(name, 0), now[name]))
            end(
                fastest,
                f"the host's disk is full ({free >> 20} MiB left), and of its sandboxes this one wrote the most",
            )
        before = now


def _taken(disk: Path) -> int:
    """Bytes of the host's disk; 0 when it is gone."""
    try:
        return disk.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
