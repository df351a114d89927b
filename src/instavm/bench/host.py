"""A server for one measurement: of its own, on the images and templates that the machine has."""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from instavm.node.vmm.choose import RECORD
from instavm.settings import Settings

KEY: Final = "bench"
MEMORY_OVERCOMMIT: Final = 16
"""What many sandboxes at one time are promised may be so many times what the host has: here they do next to nothing."""
SETTLED_S: Final = 4.0
"""After a start the node makes machines for the next ones; what is measured in the quiet begins when that is over."""


@contextmanager
def server(**settings: object) -> Iterator[Settings]:
    """Programs in this process that name no server get this one; it is gone with the block.

    settings: of the server, as in `Settings`.
    """
    with tempfile.TemporaryDirectory(prefix="ivm-bench-") as home:
        chosen = {"state_dir": f"{home}/state", "runtime_dir": f"{home}/run", **settings}
        tell_probe(Settings().state_dir, Path(home, "state"))
        names = {f"INSTAVM_{name.upper()}": str(value) for name, value in chosen.items()}
        before = {name: os.environ.get(name) for name in (*names, "INSTAVM_BASE_URL")}
        os.environ.update(names)
        os.environ.pop("INSTAVM_BASE_URL", None)
        here = Settings()
        try:
            yield here
        finally:
            _end(here.server_lock)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def tell_probe(known: Path, state_dir: Path) -> None:
    """What the host's probe has found, if `known` keeps it, is kept in `state_dir` too, so that it is not asked anew."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        shutil.copyfile(known / RECORD, state_dir / RECORD)


def _end(lock: Path) -> None:
    if not lock.exists():
        return
    pid = int(lock.read_text())
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGTERM)
        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)
