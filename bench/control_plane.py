"""What a call costs besides the work of the virtual machine: SDK → HTTP → API → control → store and back.

    python bench/control_plane.py [--calls 500] [--json bench/results/control_plane.json]

The server runs in a process of its own, as it does for users, on a node that does nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from instavm import InstaVM
from instavm.bench import report
from instavm.contract.egress import Egress, EgressDecision, EgressLog
from instavm.contract.executions import Command, Outcome, OutputSink
from instavm.contract.files import StoredFile
from instavm.contract.host import HostMemory, NodeInfo, NodeMetrics
from instavm.contract.isolation import Isolation, Tier
from instavm.contract.processes import ProcessLog, ProcessSpec, ProcessState, ProcessWait
from instavm.contract.sandboxes import Ended, SandboxSpec, Started
from instavm.contract.snapshots import Pull, Pulled, Stored
from instavm.errors import InstaVMError, ProcessNotFound
from instavm.serve import run_embedded
from instavm.settings import Settings


class NullNode:
    async def start(self, spec: SandboxSpec) -> Started:
        return Started(spec.vm_id, "null", Tier.EMULATED, cold=False, steps_ms={})

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        return Outcome("42\n", "", 0, 0.0, 0.0)

    async def stop(self, vm_id: str) -> None: ...

    async def put_file(self, vm_id: str, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
        return StoredFile(path, sum([len(chunk) async for chunk in chunks]))

    async def get_file(self, vm_id: str, path: str) -> AsyncGenerator[bytes, None]:
        yield b"42"

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None: ...

    async def start_process(self, vm_id: str, spec: ProcessSpec) -> ProcessState:
        raise ProcessNotFound("this node runs nothing")

    async def processes(self, vm_id: str) -> list[ProcessState]:
        return []

    async def read_process(
        self, vm_id: str, process_id: str, since: int, size: int, until: ProcessWait, timeout_s: float
    ) -> ProcessLog:
        raise ProcessNotFound("this node runs nothing")

    async def write_process(self, vm_id: str, process_id: str, data: bytes, last: bool) -> ProcessState:
        raise ProcessNotFound("this node runs nothing")

    async def signal_process(self, vm_id: str, process_id: str, signum: int) -> ProcessState:
        raise ProcessNotFound("this node runs nothing")

    async def set_egress(self, vm_id: str, egress: Egress) -> None: ...

    async def ask_registries(self, vm_id: str) -> None: ...

    async def check_egress(
        self, vm_id: str | None, host: str, port: int, protocol: str, egress: Egress | None = None
    ) -> EgressDecision:
        return EgressDecision(False, "no_rule", host)

    async def egress_log(self, vm_id: str) -> EgressLog:
        return EgressLog()

    async def suspend(self, vm_id: str) -> Stored:
        return Stored(vm_id, 0, 0)

    async def fork(self, vm_id: str, specs: Sequence[SandboxSpec]) -> list[Started | InstaVMError]:
        return [await self.start(spec) for spec in specs]

    async def snapshot(self, vm_id: str, name: str) -> Stored:
        return Stored(name, 0, 0)

    async def pull(self, name: str, ask: Pull, progress: Callable[[str], None]) -> Pulled:
        return Pulled(Stored(name, 0, 0), "sha256:0", {}, {})

    async def prepare(self, name: str, vcpus: int, memory_mib: int) -> None: ...

    async def stored(self) -> Mapping[str, Stored]:
        return {}

    async def forget(self, name: str) -> None: ...

    async def clear_up(self, *, dry_run: bool) -> Sequence[str]:
        return []

    async def adopted(self) -> Mapping[str, Started]:
        return {}

    async def leave(self) -> None: ...

    tier = Tier.EMULATED

    async def isolation(self, vm_id: str) -> Isolation:
        return Isolation({"vm_id": vm_id}, "", "")

    async def responds(self, within_s: float) -> bool:
        return True

    def memory(self) -> HostMemory:
        return HostMemory(1 << 30, 1 << 30)

    def on_end(self, callback: Callable[[Ended], None]) -> None: ...

    async def metrics(self) -> NodeMetrics:
        return NodeMetrics(0, {}, {}, {}, 0, 0)

    async def info(self) -> NodeInfo:
        return NodeInfo("null", "1", Tier.EMULATED, "none", {})


@asynccontextmanager
async def open_null_node(_settings: Settings, _closed_ports: Sequence[int]) -> AsyncIterator[NullNode]:
    yield NullNode()


def timed(calls: int, what: Callable[[], object]) -> dict[str, float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        what()
        times.append((time.perf_counter() - began) * 1000)
    return report.spread(times)


def measure(calls: int) -> dict[str, dict[str, float]]:
    began = time.perf_counter()
    vm = InstaVM(api_key="bench", auto_start_session=False)
    vm.get_current_user()
    results = {"first call, server started for it": report.spread([(time.perf_counter() - began) * 1000])}
    times: dict[str, list[float]] = {"start_session": [], "kill": []}
    for _ in range(calls):  # each ends before the next begins: what is promised of the host's memory is kept free
        for name, what in (("start_session", vm.start_session), ("kill", vm.kill)):
            began = time.perf_counter()
            what()
            times[name].append((time.perf_counter() - began) * 1000)
    results |= {name: report.spread(values) for name, values in times.items()}
    vm.start_session()
    vm.execute("print(6 * 7)")
    results["execute"] = timed(calls, lambda: vm.execute("print(6 * 7)"))
    results["get_session_status"] = timed(calls, vm.get_session_status)
    results["with InstaVM(): execute"] = timed(min(calls, 100), whole)
    vm.close()
    return results


def whole() -> None:
    with InstaVM(api_key="bench") as vm:
        vm.execute("print(6 * 7)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "control_plane.json")
    options = parser.parse_args()
    facts = report.machine()
    with tempfile.TemporaryDirectory(prefix="instavm-bench-") as home:
        for name in ("STATE", "CACHE", "RUNTIME"):
            os.environ[f"INSTAVM_{name}_DIR"] = f"{home}/{name.lower()}"
        os.environ["INSTAVM_IDLE_EXIT_S"] = "1"
        os.environ.pop("INSTAVM_BASE_URL", None)
        from instavm.client import embedded  # noqa: PLC0415 (after the environment is set)

        embedded.COMMAND = (sys.executable, __file__, "--embedded")
        try:
            results = measure(options.calls)
        finally:
            os.kill(int(Settings().server_lock.read_text()), signal.SIGTERM)
    report.finish(options.json, facts, results)


if __name__ == "__main__":
    if "--embedded" in sys.argv:
        sys.exit(run_embedded(sys.argv[1:], open_node=open_null_node))
    main()
