"""What control asks of a node. `serve.py` hands in the one that does it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Protocol

from instavm.sandbox import (
    Command,
    Ended,
    HostMemory,
    Isolation,
    NodeInfo,
    Outcome,
    OutputSink,
    SandboxSpec,
    Started,
    StoredFile,
    Tier,
)


class Node(Protocol):
    async def start(self, spec: SandboxSpec) -> Started:
        """Bring up a sandbox. When it returns, user code may run; when it raises, nothing of it is left.

        Raises: NoCapacity, BootFailed, HostNotReady, IsolationTooWeak, DiskFull.
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

    async def put_file(self, vm_id: str, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
        """Write a file, all or nothing, with no more of it in memory than a fixed window.

        path: relative ones start at /app; missing directories are made; one that ends in `/` or names a directory
        gets `name`, which is one path component.
        Raises: FileError, DiskFull (the sandbox's disk), SessionEnded, OutcomeUnknown; what `chunks` raises.
        """
        ...

    def get_file(self, vm_id: str, path: str) -> AsyncGenerator[bytes, None]:
        """A file's bytes, in pieces, read no faster than they are taken.

        Raises, before the first piece where it can: FileMissing, FileError, SessionEnded, OutcomeUnknown.
        """
        ...

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None:
        """Variables for everything that starts in this sandbox from now on. Raises: as `put_file`."""
        ...

    async def adopted(self) -> Mapping[str, Started]:
        """Sandboxes that an earlier server started and that live on here, by id. Asked once, before any `start`."""
        ...

    async def leave(self) -> None:
        """The server goes, its sandboxes shall stay: from now on closing the node ends none of them."""
        ...

    @property
    def tier(self) -> Tier:
        """What confines every sandbox that is started here."""
        ...

    async def isolation(self, vm_id: str) -> Isolation:
        """What confines this sandbox now, read from the running system and signed. Raises: SessionEnded."""
        ...

    def memory(self) -> HostMemory:
        """As the host tells it now. Quick: it is asked before every start."""
        ...

    async def info(self) -> NodeInfo: ...
