"""How a start grows with what is asked for: memory, vCPUs, and what was added to the image."""

from __future__ import annotations

import time
from functools import partial
from typing import Final

from instavm.bench import report
from instavm.bench.host import KEY, MEMORY_OVERCOMMIT, server
from instavm.bench.interactive import PAUSE_S, first_result
from instavm.client.sync import InstaVM

MEMORY_MIB: Final = (256, 512, 1024, 2048, 4096, 8192)
VCPUS: Final = (1, 2, 4, 8)
ADDED_MIB: Final = (0, 512)
"""What a snapshot's disk has beyond the default image, in MiB of noise."""


def measure(count: int, vcpus: int, memory_mib: int) -> report.Results:
    """`count` starts of every memory size, of every number of vCPUs, and from every snapshot, in turns."""
    sizes = [(vcpus, memory) for memory in MEMORY_MIB] + [(each, memory_mib) for each in VCPUS if each != vcpus]
    with server(memory_overcommit=MEMORY_OVERCOMMIT):
        starts = {f"{cpus} vCPUs, {memory} MB": partial(first_result, cpus, memory) for cpus, memory in sizes}
        for mib in ADDED_MIB:
            name = f"a snapshot with {mib} MiB more than the image"
            starts[name] = partial(_from_snapshot, _snapshot(mib), vcpus, memory_mib)
        times: dict[str, list[float]] = {name: [] for name in starts}
        for start in starts.values():
            start()  # may boot its template
        for _ in range(count):
            for name, start in starts.items():
                time.sleep(PAUSE_S)
                times[name].append(start())
    return {name: report.spread(found) for name, found in times.items()}


def _snapshot(mib: int) -> str:
    """Of a sandbox that has written so much; the id."""
    with InstaVM(KEY) as vm:
        if mib:
            done = vm.execute(f"dd if=/dev/urandom of=/opt/noise bs=1M count={mib} && sync", "bash", 600)
            if done.exit_code:
                raise RuntimeError(f"nothing could be added to the image: {done.stderr}")
        return str(vm.vms.snapshot(vm.get_session_info()["vm_id"], name=f"with-{mib}").snapshot_id)


def _from_snapshot(snapshot_id: str, vcpus: int, memory_mib: int) -> float:
    """Milliseconds from asking for a sandbox to its first result."""
    with InstaVM(KEY, auto_start_session=False) as vm:
        began = time.perf_counter()
        made = vm.vms.create(snapshot_id=snapshot_id, vcpu_count=vcpus, memory_mb=memory_mib)
        vm.session_id = made["session_id"]
        told = vm.execute("print(6 * 7)").stdout
        took_ms = (time.perf_counter() - began) * 1000
    if told != "42\n":
        raise RuntimeError(f"a sandbox answered {told!r}")
    return took_ms
