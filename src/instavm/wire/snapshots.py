"""Snapshots over the wire: built from an OCI image, or taken of a VM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from instavm import limits
from instavm.wire.base import Asked, Timestamp, Wire
from instavm.wire.egress import SetEgress
from instavm.wire.env import Env
from instavm.wire.sessions import Vcpus, or_


def _clamped(value: Any) -> Any:
    """The hosted service takes 128 to 8192 here; a sandbox has at least 256."""
    if value is None:
        return limits.MEMORY_MIB_DEFAULT
    return limits.MEMORY_MIB_MIN if type(value) is int and 128 <= value < limits.MEMORY_MIB_MIN else value


def _words(text: str | None) -> str | None:
    """Names, versions, extras: nothing that a package manager or a shell would take for an option or a command."""
    for word in (text or "").split():
        if word.startswith("-") or not all(char.isalnum() or char in "@/._+:=<>!~^,[]*-" for char in word):
            raise ValueError(f"{word!r} is no package")
    return text


def _plain(text: str | None) -> str | None:
    if text is not None and (text.startswith("-") or any(char in text for char in "\0\n\r")):
        raise ValueError("it begins with - or has more than one line")
    return text


Packages = Annotated[str | None, Field(max_length=limits.PACKAGES_CHARS), AfterValidator(_words)]
OneLine = Annotated[str | None, Field(max_length=2000), AfterValidator(_plain)]
MemoryMib = Annotated[
    int, BeforeValidator(_clamped), Field(strict=True, ge=limits.MEMORY_MIB_MIN, le=limits.MEMORY_MIB_MAX)
]


class BuildArgs(Asked):
    """What is added to an image. All of it runs in a sandbox of the image. Packages are separated by spaces."""

    extra_apt_packages: Packages = None
    extra_pip_packages: Packages = None
    extra_npm_packages: Packages = None
    git_clone_url: OneLine = None
    git_clone_branch: OneLine = None
    disk_size_gb: int | None = Field(None, strict=True, ge=limits.BUILD_DISK_GIB_MIN, le=limits.BUILD_DISK_GIB_MAX)
    envs: Annotated[Env, or_({})] = Field(default_factory=dict, repr=False)
    post_build_cmd: str | None = Field(None, max_length=100_000)


class CreateSnapshot(Asked):
    """`POST /v1/snapshots`. Credentials are used once, to fetch the image, and kept nowhere.

    egress_policy: what the build may reach besides package registries and the host of `git_clone_url`.
    """

    oci_image: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_plain)]
    name: str | None = Field(None, max_length=200)
    vcpu_count: Vcpus = limits.VCPUS_DEFAULT
    memory_mb: MemoryMib = limits.MEMORY_MIB_DEFAULT
    type: Annotated[Literal["user", "system"], or_("user")] = "user"
    build_args: Annotated[BuildArgs, or_(BuildArgs())] = Field(default_factory=BuildArgs)
    registry_username: str | None = None
    registry_password: SecretStr | None = None
    egress_policy: SetEgress | None = None


class Snapshot(Wire):
    """`status`: pending, building or creating → ready or failed. `error`, `message` and `last_error` say the same."""

    id: str
    snapshot_id: str
    name: str | None
    status: str
    type: str
    snapshot_type: str
    oci_image: str | None = None
    oci_digest: str | None = None
    vm_id: str | None = None
    size_bytes: int = 0
    shared_bytes: int = 0
    last_error: str | None = None
    error: str | None = None
    message: str | None = None
    created_at: Timestamp
    finished_at: Timestamp | None = None
    is_public: bool = False
    vcpu_count: int
    memory_mb: int
    build_args: dict[str, Any] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)


class SnapshotLog(Wire):
    """What a build has printed from character `offset` on; ask again from `next_offset` until `is_complete`.

    stage: what it is at. progress: 0 to 1, by stages.
    """

    snapshot_id: str
    status: str
    log: str
    next_offset: int
    is_complete: bool
    stage: str = ""
    progress: float = 1.0


class DeletedSnapshot(Wire):
    status: str = "deleted"
    snapshot_id: str


class Garbage(Wire):
    """What takes disk and is nobody's: files of an earlier life of the server, say."""

    removed: list[str]
    dry_run: bool
