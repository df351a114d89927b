"""VMs over the wire: the same sandboxes as those of sessions, named by their own id."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from pydantic import BeforeValidator, Field

from instavm import limits
from instavm.errors import UnsupportedOperationError
from instavm.wire.base import Asked, Timestamp, Wire
from instavm.wire.egress import EgressPolicy, SetEgress
from instavm.wire.env import Env
from instavm.wire.sessions import Memory, MemoryMib, Metadata, RequireIsolation, Start, Vcpus, or_

_Lifetime = Annotated[int, Field(strict=True, ge=limits.LIFETIME_S_MIN, le=limits.VM_LIFETIME_S_MAX)]
VmLifetimeS = Annotated[_Lifetime, or_(limits.LIFETIME_S_DEFAULT)]
"""The upper end is only what a date can hold: what is really allowed is a quota, refused in words of its own."""
Flag = Annotated[bool, or_(False)]


def _not_here(value: Any) -> Any:
    if value:
        raise UnsupportedOperationError("this server cannot do that when a VM is created")
    return None


NotHere = Annotated[None, BeforeValidator(_not_here)]
"""Fields of the hosted service that change what a VM is: ignoring one would make a VM that nobody asked for."""


class CreateVm(Asked):
    """`POST /v1/vms`. `session_id`: make the VM in that session, which must have none."""

    session_id: str | None = None
    vm_lifetime_seconds: VmLifetimeS = limits.LIFETIME_S_DEFAULT
    vcpu_count: Vcpus = limits.VCPUS_DEFAULT
    memory_mb: MemoryMib = limits.MEMORY_MIB_DEFAULT
    metadata: Metadata = Field(default_factory=dict)
    env: Env = Field(default_factory=dict, repr=False)
    require_isolation: RequireIsolation = None
    snapshot_on_terminate: Flag = False
    snapshot_name: str | None = Field(None, max_length=200)
    auto_suspend: Flag = False
    auto_resume: Flag = False
    egress_policy: SetEgress | None = None
    snapshot_id: str | None = Field(None, max_length=100)
    volumes: NotHere = None
    vault_ids: NotHere = None
    share: NotHere = None
    custom_domain: NotHere = None

    def options(self) -> dict[str, Any]:
        """What is kept beside the sizes."""
        return {name: getattr(self, name) for name in OPTIONS}


OPTIONS = ("snapshot_on_terminate", "snapshot_name", "auto_suspend", "auto_resume")


class UpdateVm(Asked):
    """`PATCH /v1/vms/{id}`: what is left out stays. What cannot be changed is ignored; the answer tells what holds."""

    memory_mb: Memory | None = None
    """Refused when it is not what the VM has: ignoring it would let a program run out of memory that it was promised."""
    metadata: Metadata | None = None
    vm_lifetime_seconds: _Lifetime | None = None
    """Counted from when the sandbox was ready, as at its creation; it holds for the session's next ones, too."""
    snapshot_on_terminate: bool | None = None
    snapshot_name: str | None = Field(None, max_length=200)
    auto_suspend: bool | None = None
    auto_resume: bool | None = None

    def options(self) -> dict[str, Any]:
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}


class Vm(Wire):
    """A VM's record. `id` is `vm_id`; `terminated_at` is set once nothing of it is left."""

    vm_id: str
    id: str
    session_id: UUID
    status: str
    reason: str | None = None
    error: str | None = None
    """Why it ended, as a sentence, if nobody asked it to."""
    console: list[str] = Field(default_factory=list)
    """The last lines of its serial console (20 at most), if it ended so; kept for 30 days."""
    created_at: Timestamp
    started_at: Timestamp | None = None
    expires_at: Timestamp | None = None
    terminated_at: Timestamp | None = None
    vm_lifetime_seconds: int
    vcpu_count: int
    memory_mb: int
    metadata: dict[str, Any]
    env_keys: list[str]
    egress_policy: EgressPolicy | None = None
    """None once it has ended."""
    snapshot_id: str | None = None
    snapshot_on_terminate: bool = False
    snapshot_name: str | None = None
    auto_suspend: bool = False
    auto_resume: bool = False
    image_variant: str = "standard"
    volumes: list[Any] = Field(default_factory=list)
    vault_ids: list[str] = Field(default_factory=list)
    ssh_host: str | None = None
    """None: sandboxes are not reached by SSH."""


class Deleted(Wire):
    """`status` is `terminated`."""

    status: str = "terminated"
    vm_id: str


class Suspended(Wire):
    """`status`: `suspended`, or `suspending` when nobody waited."""

    status: str
    vm_id: str
    session_id: UUID
    size_bytes: int | None = None
    pause_ms: float | None = None


class Resumed(Wire):
    """`vm_id` is new; the old one goes on meaning this sandbox."""

    vm_id: str
    session_id: UUID
    status: str
    previous_vm_id: str


class CloneVm(Asked):
    """`POST /v1/vms/{id}/clone`. snapshot_name: keep the snapshot that it takes, under this name."""

    snapshot_name: str | None = Field(None, max_length=200)


class Cloned(Wire):
    vm_id: str | None
    session_id: UUID
    status: str
    snapshot_id: str | None
    snapshot_deleted: bool


class SnapshotVm(Asked):
    """`POST /v1/vms/{id}/snapshot`."""

    name: str | None = Field(None, max_length=200)


class ForkVm(Asked):
    """`POST /v1/vms/{id}/fork`: `count` copies of a running VM. env: on top of what it has, in each copy."""

    count: int = Field(1, strict=True, ge=1, le=limits.FORKS_MAX)
    env: Env = Field(default_factory=dict, repr=False)


class Fork(Wire):
    vm_id: str
    session_id: UUID
    status: str
    start: Start | None = None


class Forked(Wire):
    """`parent_vm_id` goes on running."""

    parent_vm_id: str
    forks: list[Fork]


class StageEntry(Asked):
    env_name: str
    value: Any = Field(repr=False)


class StageEnv(Asked):
    """`POST /v1/vms/{id}/stage-env`. Values go into the guest and are kept nowhere else."""

    entries: list[StageEntry] = Field(repr=False)


class Staged(Wire):
    status: str = "staged"
    vm_id: str
    env_keys: list[str]
