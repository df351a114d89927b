"""What calls return: dictionaries, as users of the hosted service know them; keys are attributes too."""

from __future__ import annotations

from typing import Any, TypedDict


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


class Execution(Record):
    """What became of one `execute`. `str()` of it is what the code printed: stdout, then stderr.

    Code that failed is a result too: `exit_code` is not 0 and `stderr` says why. Times are seconds.
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
    vm_id: str | None
    timing: Start | None

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
    start: Start | None


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


class User(Record):
    id: str
    email: str | None
    name: str
    is_verified: bool


def _short(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
