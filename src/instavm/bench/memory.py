"""What processes take of the host's memory, as the kernel counts it. All in MiB."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from instavm.settings import Settings


def private_mib(pid: int) -> float:
    """What a process has for itself alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


@contextmanager
def peaks(settings: Settings) -> Iterator[dict[str, float]]:
    """Resident memory of the server's two processes: before the block, and at most within it. Filled when the block ends.

    settings: of the server, which runs and has been asked something.
    """
    told: dict[str, float] = {}
    processes = _server(settings)
    for process in processes.values():
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # its peak is what it has now
    before = {name: _status_mib(process, "VmRSS") for name, process in processes.items()}
    yield told
    for name, process in processes.items():
        told[f"{name}_before_mib"] = before[name]
        told[f"{name}_peak_mib"] = _status_mib(process, "VmHWM")


def _server(settings: Settings) -> Mapping[str, psutil.Process]:
    node = psutil.Process(int(settings.server_lock.read_text()))
    (api,) = (
        one for one in node.children(recursive=True) if "--control" in one.cmdline() and one.name() != "bwrap"
    )  # bubblewrap, which stands before it, has its command line too
    return {"node": node, "api": api}


def _status_mib(process: psutil.Process, name: str) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024, 1)
