"""Sandboxes' disks are thin: together they may be larger than the host's. Before that is full, who fills it has to go."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import anyio

FLOOR_BYTES = 256 << 20
"""The server, its database and every other sandbox need some room to go on."""
LOOK_S = 0.5
LATELY = 120
"""How many looks back its writing counts: a minute."""
MUCH_BYTES = 32 << 20
"""Nobody is ended for less: then it is not the sandboxes that fill the disk."""


async def watch(folder: Path, homes: Callable[[], Mapping[str, Path]], end: Callable[[str, str], None]) -> None:
    """For ever: when `folder` runs out of space, end the sandbox that wrote the most of late, if any wrote much.

    homes: live sandbox → its machine's folder. end: called with the sandbox and why.
    """
    looks: deque[dict[str, int]] = deque(maxlen=LATELY)
    while True:
        await anyio.sleep(LOOK_S)
        now = {name: _taken(home) for name, home in homes().items()}
        looks.append(now)
        free = shutil.disk_usage(folder).free
        if now and free < FLOOR_BYTES:
            written = {name: size - min(look[name] for look in looks if name in look) for name, size in now.items()}
            most = max(written, key=lambda name: (written[name], now[name]))
            if written[most] >= MUCH_BYTES:
                end(
                    most,
                    f"the host's disk is full ({free >> 20} MiB left), and of its sandboxes this one wrote the most",
                )


def _taken(home: Path) -> int:
    """Bytes of the host's disk; what is gone meanwhile counts for nothing."""
    size = 0
    for disk in home.glob("disk*.qcow2"):
        with suppress(FileNotFoundError):
            size += disk.stat().st_blocks * 512
    return size
