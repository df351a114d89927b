"""Calls about snapshots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from instavm.client.calls.base import Call, ask, record, records, segment
from instavm.client.results import Record, Snapshot
from instavm.errors import InvalidInput
from instavm.wire import snapshots as wire


def create(
    oci_image: str,
    name: str | None = None,
    vcpu_count: int | None = None,
    memory_mb: int | None = None,
    snapshot_type: str | None = None,
    build_args: Mapping[str, Any] | None = None,
    registry_username: str | None = None,
    registry_password: str | None = None,
    egress_policy: Mapping[str, Any] | None = None,
) -> Call[Snapshot]:
    """Begin to build a snapshot from an OCI image; ask `get` until its status is `ready` or `failed`.

    oci_image: `python:3.12-slim`, `host:port/name@sha256:…`; on the server's disk `oci:/path:tag`, `docker-archive:/path`.
    build_args: `extra_apt_packages`, `extra_pip_packages`, `extra_npm_packages`, `git_clone_url`, `git_clone_branch`, `envs`,
        `post_build_cmd`, `disk_size_gb`; all of it runs in a sandbox of the image. Raises: InvalidInput, QuotaExceededError.
    egress_policy: what that may reach besides package registries and the host of `git_clone_url`; fields as for VMs.
    """
    given = ask(
        wire.CreateSnapshot,
        oci_image=oci_image,
        name=name,
        vcpu_count=vcpu_count,
        memory_mb=memory_mb,
        type=snapshot_type,
        build_args=build_args,
        registry_username=registry_username,
        registry_password=registry_password,
        egress_policy=egress_policy,
    )
    body = given.model_dump_json(exclude_unset=True)
    if registry_password is not None:
        body = given.model_copy(update={"registry_password": registry_password}).model_dump_json(
            exclude_unset=True, warnings=False
        )
    return Call("POST", "/v1/snapshots", record(Snapshot, wire.Snapshot), body.encode())


def list_(type: str | None = None) -> Call[list[Snapshot]]:
    """Newest first. type: `user` or `system`; None = both. Raises: InvalidInput."""
    if type not in (None, "user", "system"):
        raise InvalidInput("type", type, "user or system")
    params = {} if type is None else {"type": type}
    return Call("GET", "/v1/snapshots", records(Snapshot, wire.Snapshot), params=params)


def get(snapshot_id: str) -> Call[Snapshot]:
    return Call("GET", f"/v1/snapshots/{segment(snapshot_id=snapshot_id)}", record(Snapshot, wire.Snapshot))


def logs(snapshot_id: str, offset: int = 0) -> Call[Record]:
    """What the build has printed from character `offset` on: `log`, `next_offset`, `is_complete`, `stage`, `progress`."""
    path = f"/v1/snapshots/{segment(snapshot_id=snapshot_id)}/logs"
    return Call("GET", path, record(Record, wire.SnapshotLog), params={"offset": str(offset)})


def cancel(snapshot_id: str) -> Call[Snapshot]:
    """End a build; it is `failed` then."""
    return Call("POST", f"/v1/snapshots/{segment(snapshot_id=snapshot_id)}/cancel", record(Snapshot, wire.Snapshot))


def delete(snapshot_id: str) -> Call[Record]:
    """Remove one; what runs from it runs on."""
    return Call("DELETE", f"/v1/snapshots/{segment(snapshot_id=snapshot_id)}", record(Record, wire.DeletedSnapshot))


def garbage(dry_run: bool = False) -> Call[Record]:
    """Remove what takes disk on the server and belongs to nothing any more: `removed`. dry_run: only tell."""
    params = {"dry_run": "true" if dry_run else "false"}
    return Call("POST", "/v1/snapshots/garbage", record(Record, wire.Garbage), params=params)


CALLS: Final[Mapping[str, Callable[..., Call[Any]]]] = {
    "create": create,
    "list": list_,
    "get": get,
    "logs": logs,
    "cancel": cancel,
    "delete": delete,
    "garbage": garbage,
}
