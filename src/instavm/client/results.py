"""What calls return: dictionaries, as users of the hosted service know them; keys are attributes too."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Final, TypedDict

from instavm.errors import ExecutionError

SVG: Final = "image/svg+xml"
IMAGES: Final = {"image/png": "png", "image/jpeg": "jpg", SVG: "svg"}


class Start(TypedDict):
    """How a sandbox came up. `steps_ms` adds up to the whole; `cold`: its template had to be made first."""

    vm_id: str
    driver: str
    tier: str
    cold: bool
    steps_ms: dict[str, float]


class Record(dict[str, Any]):
    """`result["name"]` and `result.name` are the same."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(self)}") from None


class VmRecord(Record):
    """A VM: `vm_id`, `session_id`, `status` (creating, active, suspending, suspended, or how it ended) and more."""

    vm_id: str
    session_id: str
    status: str


class Suspended(Record):
    vm_id: str
    session_id: str
    status: str


class Resumed(Record):
    """`vm_id` is new, `previous_vm_id` goes on meaning the same sandbox."""

    vm_id: str
    session_id: str
    status: str
    previous_vm_id: str


class Forked(Record):
    """`forks`: each with `vm_id`, `session_id` and how it came up."""

    parent_vm_id: str
    forks: list[dict[str, Any]]


class Snapshot(Record):
    """`status`: pending, building or creating → ready or failed (`last_error` says why)."""

    snapshot_id: str
    status: str
    name: str | None
    size_bytes: int
    last_error: str | None


class Execution(Record):
    """What became of one `execute`. `str()` of it is what the code printed: stdout, then stderr.

    Code that failed is a result too: `exit_code` is not 0 and `stderr` says why. Times are seconds.
    `refused`: destinations that the sandbox's network refused meanwhile, with `name` or `address`, `port`, `rule` and `count`.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    execution_time: float
    cpu_time: float
    session_id: str | None
    language: str | None
    timed_out: bool
    truncated: bool
    reason: str | None
    signal: int | None
    peak_memory_bytes: int
    outputs: list[dict[str, Any]] | None
    refused: list[dict[str, Any]] | None
    vm_id: str | None
    timing: Start | None

    def save_images(self, directory: str | Path) -> list[Path]:
        """Write every image among the outputs to a file `output-<n>.<png|jpg|svg>`; the directory is made if need be.

        Returns: the files, in the order in which they were shown. Raises ExecutionError: an image is no base64; OSError.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for number, bundle in enumerate(self.get("outputs") or [], 1):
            for mime, ending in IMAGES.items():
                if isinstance(data := bundle.get(mime), str):
                    file = folder / f"output-{number}.{ending}"
                    file.write_bytes(data.encode() if mime == SVG else _pixels(data, mime, number))
                    written.append(file)
                    break
        return written

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        """For notebooks: the last thing that was shown, with what was printed as its text."""
        outputs = self.get("outputs") or [{}]
        return {**outputs[-1], "text/plain": str(self)}

    def __str__(self) -> str:
        return str(self["stdout"]) + str(self["stderr"])

    def __repr__(self) -> str:
        shown = [f"exit_code={self['exit_code']}", f"stdout={_short(self['stdout'])}"]
        if self["stderr"]:
            shown.append(f"stderr={_short(self['stderr'])}")
        shown += [f"{name}={self[name]!r}" for name in ("timed_out", "truncated", "reason") if self[name]]
        return f"Execution({', '.join(shown)}, execution_time={self['execution_time']:.3f})"


class SessionInfo(Record):
    """A session's record. `start` tells how its latest sandbox came up. Times are UTC, ISO-8601."""

    session_id: str
    status: str
    reason: str | None
    vm_id: str | None
    created_at: str
    expires_at: str | None
    vm_lifetime_seconds: int
    vcpu_count: int
    memory_mb: int
    metadata: dict[str, Any]
    env_keys: list[str]
    egress_policy: EgressPolicy
    start: Start | None
    error: str | None
    """Why its latest sandbox failed, in a sentence; None when it did not."""


class SessionStatus(Record):
    """`vm_status` is `active` for a live sandbox."""

    session_id: str
    exists: bool
    vm_assigned: bool
    vm_alive: bool
    vm_status: str | None
    vm_id: str | None
    uptime_seconds: float | None
    expires_in_seconds: float | None
    created_at: str


class SessionUsage(Record):
    """Times are seconds."""

    session_id: str
    execution_count: int
    total_execution_time: float
    cpu_time: float
    vm_seconds: float
    memory_mb: int
    vcpu_count: int


class Sandbox(Record):
    """One live sandbox. `end_at` is when its lifetime runs out."""

    sandbox_id: str
    session_id: str
    template_id: str | None
    name: str
    metadata: dict[str, Any]
    started_at: str
    end_at: str | None
    status: str


class AppUrl(Record):
    """Where a web server in the sandbox is reached."""

    url: str
    app_url: str
    direct_url: str
    vm_ip: str
    port: int
    vm_id: str
    session_id: str
    status: str
    expires_in_seconds: int | None


class TaskBegun(Record):
    """Code that runs on by itself; `task_id` is what to ask for its result with."""

    task_id: str
    session_id: str
    status: str
    language: str
    created_at: str


class Task(Record):
    """`status`: pending, running, completed, failed (exit code not 0), timeout, killed (it ended with its sandbox)."""

    task_id: str
    session_id: str
    vm_id: str | None
    status: str
    is_complete: bool
    language: str
    exit_code: int | None
    stdout: str
    stderr: str
    serialized_stdout: str
    serialized_stderr: str
    execution_time: float | None
    cpu_time: float | None
    truncated: bool
    reason: str | None
    created_at: str
    finished_at: str | None


class ProcessInfo(Record):
    """A process of the sandbox, as it was when this was told. `status`: running or exited; times are seconds.

    `written`: bytes of output so far, of which those from `kept_from` on are kept.
    """

    process_id: str
    session_id: str
    status: str
    command: str
    cwd: str
    pid: int | None
    started_at: str
    stdin_open: bool
    written: int
    kept_from: int
    exit_code: int | None
    signal: int | None
    reason: str | None
    execution_time: float | None
    cpu_time: float | None
    peak_memory_bytes: int | None


class ProcessOutput(ProcessInfo):
    """A process and a window of its output. `text` is both streams in the order in which they came.

    `next`: where to read on. `lost`: bytes before the window that were not kept.
    """

    stdout: str
    stderr: str
    text: str
    next: int
    lost: int

    def __str__(self) -> str:
        return str(self["text"])


class UploadedFile(Record):
    """`remote_path`: where it lies now, absolute. `size` in bytes."""

    status: str
    remote_path: str
    size: int


class DownloadedFile(Record):
    """With `content`, or with the `local_path` it was written to. `size` in bytes."""

    status: str
    filename: str
    size: int
    content: bytes
    local_path: str


class Isolation(Record):
    """What confines a sandbox: `report`, and the `signature` of its host, to be checked with `instavm isolation verify`."""

    report: dict[str, Any]
    signature: str
    public_key: str
    algorithm: str


class User(Record):
    id: str
    email: str | None
    name: str
    is_verified: bool


def _pixels(data: str, mime: str, number: int) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise ExecutionError(f"output {number} says that it is {mime}, but is no base64: {_short(data, 40)}") from None


def _short(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")


class EgressPolicy(Record):
    """What is in force. `status`: `applied`, or `pending` while there is no sandbox that it could hold for."""

    allow_package_managers: bool
    allow_public_repos: bool
    allow_http: bool
    allow_https: bool
    allowed_domains: list[str]
    allowed_cidrs: list[str]
    status: str


class EgressCheck(Record):
    """What the egress filter says about one destination.

    `rule`: what decides, which `detail` says in words; `source`: where that comes from; `remedy`: None if it is allowed.
    """

    host: str
    port: int
    protocol: str
    allowed: bool
    rule: str
    source: str
    detail: str
    remedy: str | None
    vm_id: str | None
    applied: bool


class EgressLog(Record):
    """Where a sandbox went, or tried to. An entry has `name` or `address`, `port`, `protocol`, `allowed`, `rule`, `count`."""

    vm_id: str
    entries: list[dict[str, Any]]
    bytes_sent: int
    bytes_received: int
    open_connections: int
