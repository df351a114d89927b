"""The words that control and node share: what is asked of a node, and what it answers.

Frozen values only; no I/O. Control decides with them, a node acts on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal


class Tier(StrEnum):
    """What confines a sandbox. Shown to users, never hidden."""

    KVM = "kvm"
    EMULATED = "emulated"

    def satisfies(self, wanted: Tier | None) -> bool:
        """Whether it is at least as strong."""
        return wanted is None or self is Tier.KVM or wanted is Tier.EMULATED


class EndReason(StrEnum):
    """Why a sandbox is gone."""

    KILLED = "killed"
    LIFETIME = "lifetime"
    BOOT_FAILED = "boot_failed"
    CRASHED = "crashed"
    OVER_LIMIT = "over_limit"
    """Its VMM used more of the host than a sandbox of its size may."""
    NODE_LOST = "node_lost"
    SERVER_STOPPED = "server_stopped"
    RESUMED = "resumed"
    """It was at rest, and goes on under another id."""


@dataclass(frozen=True, slots=True)
class Egress:
    """What a sandbox may reach; the default is nothing. What each field opens, and what nothing opens: docs/network.md."""

    packages: bool = False
    """The registries that the image's package managers use."""
    http: bool = False
    https: bool = False
    domains: tuple[str, ...] = ()
    """Lower case, without a dot at the end; `*.name` stands for every name below it."""
    cidrs: tuple[str, ...] = ()

    @property
    def opens(self) -> bool:
        """Whether anything at all may be reached."""
        return self.packages or self.http or self.https or bool(self.domains or self.cidrs)


NOTHING: Final = Egress()


@dataclass(frozen=True, slots=True)
class Seen:
    """One destination that a sandbox went for: `rule` is what allowed it, or why it was refused."""

    name: str | None
    address: str | None
    port: int
    protocol: str
    allowed: bool
    rule: str
    count: int
    first_at: float | None = None
    """Seconds since the epoch; None where only a count is kept."""
    last_at: float | None = None
    registry: bool = False
    """Whether it is one of the image's package registries."""


@dataclass(frozen=True, slots=True)
class EgressLog:
    """Where a sandbox went, or tried to, since it has its network; bytes are those of connections that were allowed."""

    seen: tuple[Seen, ...] = ()
    bytes_sent: int = 0
    bytes_received: int = 0
    open_connections: int = 0


@dataclass(frozen=True, slots=True)
class EgressDecision:
    """What the egress filter says about one destination. `rule`: as in `Seen`. `name` or `address`: what was asked for.

    address: with a name, one that it resolves to and that may not be reached.
    """

    allowed: bool
    rule: str
    name: str | None
    address: str | None = None
    registry: bool = False
    """Whether it is a package registry of the image, or of the operator."""
    operators: bool = False
    """Whether it is allowed because the operator named it."""


@dataclass(frozen=True, slots=True)
class SandboxSpec:
    vm_id: str
    vcpus: int
    memory_mib: int
    image: str = "default"
    """`default`, or the id of a disk snapshot."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    egress: Egress = NOTHING
    resumes: str | None = None
    """The id of a sandbox at rest that this one goes on from; `image` and sizes are what they were."""
    require_isolation: Tier | None = None
    """The weakest tier that will do; on less it is not started."""


@dataclass(frozen=True, slots=True)
class Started:
    """A sandbox that is ready for user code: restored, and made different from every other clone."""

    vm_id: str
    driver: str
    tier: Tier
    cold: bool
    """True when this size was asked for the first time and its template had to be booted."""
    steps_ms: Mapping[str, float]
    """Milliseconds per step, in the order they happened; they add up to the whole."""


@dataclass(frozen=True, slots=True)
class Command:
    code: str
    language: str
    timeout_s: float
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    task: str | None = None
    """A name under which the sandbox runs this once and keeps what it wrote and how it ended. Sent again under the same
    name (with no code, if it is not known any more), it is waited for and not run again: servers may come and go."""


ProcessWait = Literal["now", "more", "end"]
"""What a reader of a process's log waits for: nothing, more of it (or the end), the end."""
Stream = Literal["stdout", "stderr", "output"]
"""`output`: one rich output, whole, as a JSON object {MIME type: data}."""
Channel = Literal["stdout", "stderr"]
OutputSink = Callable[[Stream, bytes], None]
Bundle = Mapping[str, object]
"""One rich output: MIME type → data; text as it is, JSON as values, anything else as base64."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one command. Code that failed is an outcome too, not an error."""

    stdout: str
    stderr: str
    exit_code: int
    execution_time_s: float
    cpu_time_s: float
    timed_out: bool = False
    truncated: bool = False
    reason: str | None = None
    """None = it ended by itself; else what ended it: timeout, interpreter_crashed, oom …"""
    signal: int | None = None
    """The signal that ended it."""
    peak_memory_bytes: int = 0
    """Largest resident size of one process of it."""
    outputs: tuple[Bundle, ...] = ()
    refused: tuple[Seen, ...] = ()
    """What the sandbox's network refused while it ran, whoever in the sandbox asked for it; bounded."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process that is to run in the background. `shown`: its command for people, not longer than it need be."""

    id: str
    argv: tuple[str, ...]
    shown: str
    cwd: str
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class ProcessEnd:
    """How a process or a command ended. Times are seconds. `signal`, `reason`: as in `Outcome`."""

    exit_code: int
    signal: int | None
    reason: str | None
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A process as its sandbox tells of it. Positions count the bytes that it has written, on both streams together."""

    id: str
    command: str
    cwd: str
    pid: int | None
    started_at: datetime
    """By the sandbox's clock."""
    takes_input: bool
    log_begin: int
    """Position of the oldest byte that is kept."""
    log_end: int
    ended: ProcessEnd | None = None


@dataclass(frozen=True, slots=True)
class ProcessLog:
    """A window of what a process wrote, in order. `next`: where to read on; `lost`: bytes that are not kept any more."""

    state: ProcessState
    pieces: tuple[tuple[Channel, bytes], ...]
    next: int
    lost: int


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was written: where it came to lie (absolute), and its bytes."""

    path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Stored:
    """Something at rest on a node. Bytes are those on the host's disk; shared ones belong to others too."""

    name: str
    own_bytes: int
    shared_bytes: int
    pause_ms: float = 0.0
    """How long the sandbox stood still for it."""


@dataclass(frozen=True, slots=True)
class Pull:
    """An image to fetch. `reference`: of a registry, or `oci:` / `docker-archive:` and a path on the node.

    disk_gib: size of the disk that is made of it; None = what it takes, with room.
    """

    reference: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    disk_gib: int | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Pulled:
    """What an image turned out to be. `digest`: of its manifest, `sha256:…`."""

    stored: Stored
    digest: str
    env: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of the machine that sandboxes run on, in MiB. `available`: what could be used now without swapping."""

    total_mib: int
    available_mib: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A sandbox ended without being told to."""

    vm_id: str
    reason: EndReason
    detail: str
    console: str = ""
    """The last lines of the guest's serial console, without control characters."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What confines a sandbox now, signed by its host: as `wire.isolation.Isolation`."""

    report: Mapping[str, Any]
    signature: str
    public_key: str


@dataclass(frozen=True, slots=True)
class NodeMetrics:
    """What a node counts, since its server began or at this moment. Nothing in it is about one sandbox or one user."""

    running: int
    waiting: Mapping[str, int]
    """Machines made ahead of a request, by how far they are: `spare_machine`, `warm_machine`."""
    starts: Mapping[str, int]
    """Sandboxes that came up, by what they were made of: `machine` (nothing was there), the two above, `saved_machine`."""
    start_seconds: Mapping[str, float]
    """How long these starts took, added up."""
    cold: int
    """How many of them had to boot their template first."""
    failed: int
    """Starts that failed, whatever the reason."""


@dataclass(frozen=True, slots=True)
class NodeInfo:
    driver: str
    driver_version: str
    tier: Tier
    probe: str
    """How the tier was established, in words."""
    images: Mapping[str, str]
    """Name → content digest."""
