"""What control asks of a node: a sum of small protocols. `serve.py` hands in the node that carries it out.

A service takes the protocol that it uses, not the whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

from instavm.contract.egress import Egress, EgressDecision, EgressLog
from instavm.contract.executions import Command, Outcome, OutputSink
from instavm.contract.files import StoredFile
from instavm.contract.host import HostMemory, NodeInfo, NodeMetrics
from instavm.contract.isolation import Isolation, Tier
from instavm.contract.processes import ProcessLog, ProcessSpec, ProcessState, ProcessWait
from instavm.contract.sandboxes import Ended, SandboxSpec, Started
from instavm.contract.snapshots import Pull, Pulled, Stored
from instavm.errors import InstaVMError


class Sandboxes(Protocol):
    """Sandboxes from their start to their end, and their copies."""

    async def start(self, spec: SandboxSpec) -> Started:
        """Bring up a sandbox. When it returns, user code may run; when it raises, nothing of it is left.

        Raises: NoCapacity, BootFailed, HostNotReady, IsolationTooWeak, DiskFull.
        """
        ...

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        """Run one command to its end. `on_output` sees each piece as it arrives. One that is coming up is waited for.

        Raises: SessionEnded (no such sandbox here), OutcomeUnknown (it was lost while the command ran).
        """
        ...

    async def stop(self, vm_id: str) -> None:
        """End a sandbox and wait until nothing of it is left. Unknown or already gone is fine."""
        ...

    def on_end(self, callback: Callable[[Ended], None]) -> None:
        """Be told, on the event loop, of every sandbox that ends without `stop`."""
        ...

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None:
        """Variables for everything that starts in this sandbox from now on. Raises: as `put_file`."""
        ...

    async def suspend(self, vm_id: str) -> Stored:
        """Put a sandbox to rest under its own id, memory and disk, and end it. When it raises, it runs as before.

        Raises: SessionEnded, DiskFull, BootFailed, OutcomeUnknown (it was lost).
        """
        ...

    async def fork(self, vm_id: str, specs: Sequence[SandboxSpec]) -> list[Started | InstaVMError]:
        """Start sandboxes that go on from where this one is, which goes on too; only ids and `env` of `specs` count.

        Returns, in order: each as it came up, or why it did not. Raises: as `suspend`; then there is none.
        """
        ...

    async def adopted(self) -> Mapping[str, Started]:
        """Sandboxes that an earlier server started and that live on here, by id. Asked once, before any `start`.

        They reach nothing until `set_egress`.
        """
        ...

    async def leave(self) -> None:
        """The server goes, its sandboxes shall stay: from now on closing the node ends none of them."""
        ...


class Files(Protocol):
    """Files in a sandbox."""

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


class Processes(Protocol):
    """Programs that run in the background of a sandbox.

    All methods raise ProcessNotFound, ProcessEnded, ProcessError, RateLimitError (too many run), SessionEnded, OutcomeUnknown.
    """

    async def start_process(self, vm_id: str, spec: ProcessSpec) -> ProcessState:
        """Start a process that runs on in the background; one of this id that is there already is told of instead.

        Raises RateLimitError: too many run.
        """
        ...

    async def processes(self, vm_id: str) -> list[ProcessState]:
        """Those that run, and of those that have ended the latest, in the order in which they began or ended."""
        ...

    async def read_process(
        self, vm_id: str, process_id: str, since: int, size: int, until: ProcessWait, timeout_s: float
    ) -> ProcessLog:
        """At most `size` bytes of its log from position `since`, or from the oldest that is kept.

        until: what to wait for, `timeout_s` at most; then what there is by then is told.
        """
        ...

    async def write_process(self, vm_id: str, process_id: str, data: bytes, last: bool) -> ProcessState:
        """Give its stdin `data`, all or nothing, and then its end if this is the last."""
        ...

    async def signal_process(self, vm_id: str, process_id: str, signum: int) -> ProcessState:
        """To its process group; SIGKILL to everything that it has started, also after its own end."""
        ...


class EgressControl(Protocol):
    """What a sandbox may reach in the network."""

    async def set_egress(self, vm_id: str, egress: Egress) -> None:
        """In force when it returns; connections that it does not allow are cut. When it raises, nothing gets through.

        Raises: SessionEnded, HostNotReady (this host cannot give sandboxes a network).
        """
        ...

    async def check_egress(
        self, vm_id: str | None, host: str, port: int, protocol: str, egress: Egress | None = None
    ) -> EgressDecision:
        """What the egress filter says about a destination, without going there.

        egress: decide by this instead of what is in force. With no `vm_id` it is needed; the default image's registries count.
        Raises: SessionEnded, HostNotReady (no network here, or no filter).
        """
        ...

    async def ask_registries(self, vm_id: str) -> None:
        """Look again where what is installed in it now gets packages from; the next `set_egress` counts with that.

        Raises: SessionEnded.
        """
        ...

    async def egress_log(self, vm_id: str) -> EgressLog:
        """Where it went and what was refused, bounded; once more after it has ended. Raises: SessionEnded."""
        ...


class Snapshots(Protocol):
    """Suspended sandboxes, disk snapshots and images on the node's disk."""

    async def snapshot(self, vm_id: str, name: str) -> Stored:
        """The disk of a sandbox, which goes on, as an image of its own. Raises: as `suspend`; SnapshotError."""
        ...

    async def pull(self, name: str, ask: Pull, progress: Callable[[str], None]) -> Pulled:
        """An OCI image as the disk snapshot `name`. Nothing of it is run. Raises: SnapshotError, DiskFull, HostNotReady."""
        ...

    async def prepare(self, name: str, vcpus: int, memory_mib: int) -> None:
        """Boot a disk snapshot with these sizes once, so that sandboxes of it start fast. Raises: as `start`."""
        ...

    async def stored(self) -> Mapping[str, Stored]:
        """Everything at rest here, by the names that were given."""
        ...

    async def forget(self, name: str) -> None:
        """Remove what is at rest under that name. Sandboxes that run are not touched. Unknown is fine."""
        ...

    async def clear_up(self, *, dry_run: bool) -> Sequence[str]:
        """Remove what takes disk and is nobody's any more; what that was. Also done when something is forgotten, and at start."""
        ...


class Host(Protocol):
    """The host and the node itself."""

    async def responds(self, within_s: float) -> bool:
        """Whether the node's process handles messages now. Returns: False when it does not within `within_s` seconds."""
        ...

    @property
    def tier(self) -> Tier:
        """What confines every sandbox that is started here."""
        ...

    async def isolation(self, vm_id: str) -> Isolation:
        """What confines this sandbox now, read from the running system and signed.

        Raises: SessionEnded, HostNotReady (a part of it does not answer).
        """
        ...

    def memory(self) -> HostMemory:
        """As the host tells it now. Quick: it is asked before every start."""
        ...

    async def metrics(self) -> NodeMetrics:
        """What it has started since it is there, and from what."""
        ...

    async def info(self) -> NodeInfo: ...


class Node(Sandboxes, Files, Processes, EgressControl, Snapshots, Host, Protocol):
    """All of it: a node on this host, or one that is asked over a socket."""
