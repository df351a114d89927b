"""What control asks of a node. `serve.py` hands in the one that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from instavm.sandbox import Command, Ended, NodeInfo, Outcome, OutputSink, SandboxSpec, Started


class Node(Protocol):
    async def start(self, spec: SandboxSpec) -> Started:
        """Bring up a sandbox. When it returns, user code may run; when it raises, nothing of it is left.

        Raises: NoCapacity, BootFailed, HostNotReady, DiskFull.
        """
        ...

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        """Run one command to its end. `on_output` sees each piece as it arrives.

        Raises: SessionEnded (no such sandbox here), OutcomeUnknown (it was lost while the command ran).
        """
        ...

    async def stop(self, vm_id: str) -> None:
        """End a sandbox and wait until nothing of it is left. Unknown or already gone is fine."""
        ...

    def on_end(self, callback: Callable[[Ended], None]) -> None:
        """Be told, on the event loop, of every sandbox that ends without `stop`."""
        ...

    async def info(self) -> NodeInfo: ...
