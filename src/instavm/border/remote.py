"""A `Node` whose every method is asked of a process at the other end of a socket."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio

from instavm.border.calling import Calls
from instavm.border.link import linked
from instavm.contract.egress import Egress, EgressDecision, EgressLog
from instavm.contract.executions import Command, Outcome, OutputSink
from instavm.contract.files import StoredFile
from instavm.contract.host import HostMemory, NodeInfo, NodeMetrics
from instavm.contract.isolation import Isolation, Tier
from instavm.contract.node import Node
from instavm.contract.processes import ProcessLog, ProcessSpec, ProcessState, ProcessWait
from instavm.contract.sandboxes import SandboxSpec, Started
from instavm.contract.snapshots import Pull, Pulled, Stored
from instavm.errors import InstaVMError
from instavm.node import memory


class RemoteNode(Calls):
    """As `Node` describes it; mypy checks this class against it in `connected`."""

    tier: Tier

    def memory(self) -> HostMemory:
        """The node is on this host."""
        return memory.now()

    async def start(self, spec: SandboxSpec) -> Started:
        answer: Started = await self._ask("start", spec=spec)
        return answer

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        answer: Outcome = await self._ask("execute", vm_id=vm_id, command=command, on_output=on_output)
        return answer

    async def stop(self, vm_id: str) -> None:
        await self._ask("stop", vm_id=vm_id)

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None:
        await self._ask("stage_env", vm_id=vm_id, env=env)

    async def suspend(self, vm_id: str) -> Stored:
        answer: Stored = await self._ask("suspend", vm_id=vm_id)
        return answer

    async def fork(self, vm_id: str, specs: Sequence[SandboxSpec]) -> list[Started | InstaVMError]:
        answer: list[Started | InstaVMError] = await self._ask("fork", vm_id=vm_id, specs=specs)
        return answer

    async def adopted(self) -> Mapping[str, Started]:
        answer: Mapping[str, Started] = await self._ask("adopted")
        return answer

    async def leave(self) -> None:
        await self._ask("leave")

    async def put_file(self, vm_id: str, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
        answer: StoredFile = await self._ask("put_file", vm_id=vm_id, path=path, name=name, chunks=chunks)
        return answer

    def get_file(self, vm_id: str, path: str) -> AsyncGenerator[bytes, None]:
        return self._stream("get_file", vm_id=vm_id, path=path)

    async def start_process(self, vm_id: str, spec: ProcessSpec) -> ProcessState:
        answer: ProcessState = await self._ask("start_process", vm_id=vm_id, spec=spec)
        return answer

    async def processes(self, vm_id: str) -> list[ProcessState]:
        answer: list[ProcessState] = await self._ask("processes", vm_id=vm_id)
        return answer

    async def read_process(
        self, vm_id: str, process_id: str, since: int, size: int, until: ProcessWait, timeout_s: float
    ) -> ProcessLog:
        answer: ProcessLog = await self._ask(
            "read_process", vm_id=vm_id, process_id=process_id, since=since, size=size, until=until, timeout_s=timeout_s
        )
        return answer

    async def write_process(self, vm_id: str, process_id: str, data: bytes, last: bool) -> ProcessState:
        answer: ProcessState = await self._ask(
            "write_process", vm_id=vm_id, process_id=process_id, data=data, last=last
        )
        return answer

    async def signal_process(self, vm_id: str, process_id: str, signum: int) -> ProcessState:
        answer: ProcessState = await self._ask("signal_process", vm_id=vm_id, process_id=process_id, signum=signum)
        return answer

    async def set_egress(self, vm_id: str, egress: Egress) -> None:
        await self._ask("set_egress", vm_id=vm_id, egress=egress)

    async def check_egress(
        self, vm_id: str | None, host: str, port: int, protocol: str, egress: Egress | None = None
    ) -> EgressDecision:
        answer: EgressDecision = await self._ask(
            "check_egress", vm_id=vm_id, host=host, port=port, protocol=protocol, egress=egress
        )
        return answer

    async def ask_registries(self, vm_id: str) -> None:
        await self._ask("ask_registries", vm_id=vm_id)

    async def egress_log(self, vm_id: str) -> EgressLog:
        answer: EgressLog = await self._ask("egress_log", vm_id=vm_id)
        return answer

    async def snapshot(self, vm_id: str, name: str) -> Stored:
        answer: Stored = await self._ask("snapshot", vm_id=vm_id, name=name)
        return answer

    async def pull(self, name: str, ask: Pull, progress: Callable[[str], None]) -> Pulled:
        answer: Pulled = await self._ask("pull", name=name, ask=ask, progress=progress)
        return answer

    async def prepare(self, name: str, vcpus: int, memory_mib: int) -> None:
        await self._ask("prepare", name=name, vcpus=vcpus, memory_mib=memory_mib)

    async def stored(self) -> Mapping[str, Stored]:
        answer: Mapping[str, Stored] = await self._ask("stored")
        return answer

    async def forget(self, name: str) -> None:
        await self._ask("forget", name=name)

    async def clear_up(self, *, dry_run: bool) -> Sequence[str]:
        answer: Sequence[str] = await self._ask("clear_up", dry_run=dry_run)
        return answer

    async def isolation(self, vm_id: str) -> Isolation:
        answer: Isolation = await self._ask("isolation", vm_id=vm_id)
        return answer

    async def metrics(self) -> NodeMetrics:
        answer: NodeMetrics = await self._ask("metrics")
        return answer

    async def info(self) -> NodeInfo:
        answer: NodeInfo = await self._ask("info")
        return answer


@asynccontextmanager
async def connected(
    end: socket.socket, lost: Callable[[], None] = lambda: None, on_signal: Callable[[int], None] = lambda number: None
) -> AsyncIterator[Node]:
    """The node at the other end, for as long as the block lasts. `lost` is called when it goes before that.

    on_signal: called with each signal by which the server was asked to end.
    """
    remote = RemoteNode()
    remote.on_signal = on_signal
    remote.link = await linked(end, remote.take)

    async def watch() -> None:
        await remote.link.closed.wait()
        remote.lost()
        lost()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        try:
            node: Node = remote
            remote.tier = (await remote.info()).tier
            tasks.start_soon(remote.watch)  # not before: a node that starts answers when it is open
            yield node
        finally:
            tasks.cancel_scope.cancel()
            remote.link.close()
