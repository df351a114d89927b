"""Calls about VMs: the sandboxes of sessions, by their own id."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from instavm.client.calls.base import Call, ask, body_of, record, records, segment
from instavm.client.results import Forked, Record, Resumed, Snapshot, Suspended, VmRecord
from instavm.wire import snapshots as snapshots_wire
from instavm.wire import vms as wire

SLOW_S: Final = 900.0
"""How long the server may take for what may have to boot an image for the first time."""


def create(wait: bool = True, **wanted: Any) -> Call[VmRecord]:
    """A VM in a session of its own. `snapshot_id`: on that disk; sizes, `env`, `metadata`, `vm_lifetime_seconds` and more.

    Raises: InvalidInput; NotFound, SnapshotError (it is not ready); QuotaExceededError, NoCapacity, BootFailed.
    """
    body = body_of(ask(wire.CreateVm, **wanted))
    return _call("POST", "/v1/vms", VmRecord, wire.Vm, body, params={"wait": _word(wait)})


def get(vm_id: str) -> Call[VmRecord]:
    return _call("GET", _path(vm_id), VmRecord, wire.Vm)


def list_() -> Call[list[VmRecord]]:
    """Those that are up or coming up, newest first."""
    return Call("GET", "/v1/vms", records(VmRecord, wire.Vm))


def list_all_records() -> Call[list[VmRecord]]:
    """All that this account ever had, newest first: also suspended ones, and those that ended."""
    return Call("GET", "/v1/vms/", records(VmRecord, wire.Vm))


def update(vm_id: str, **wanted: Any) -> Call[VmRecord]:
    """`metadata`, `vm_lifetime_seconds`, `auto_suspend`, `auto_resume`, `snapshot_on_terminate`, `snapshot_name`.

    Raises: UnsupportedOperationError: another `memory_mb` than it has.
    """
    body = body_of(ask(wire.UpdateVm, **wanted))
    return _call("PATCH", _path(vm_id), VmRecord, wire.Vm, body)


def delete(vm_id: str) -> Call[Record]:
    return _call("DELETE", _path(vm_id), Record, wire.Deleted)


def suspend(vm_id: str) -> Call[Suspended]:
    """Put it to rest, memory and disk. Raises: Conflict (it is not up), DiskFull, QuotaExceededError."""
    return _call("POST", _path(vm_id, "suspend"), Suspended, wire.Suspended)


def resume(vm_id: str, wait: bool = True) -> Call[Resumed]:
    """Bring it back, under a new id; the old one goes on meaning it. Raises: Conflict, CorruptSnapshot, NoCapacity."""
    return _call("POST", _path(vm_id, "resume"), Resumed, wire.Resumed, params={"wait": _word(wait)})


def fork(vm_id: str, count: int = 1, env: Mapping[str, Any] | None = None) -> Call[Forked]:
    """Copies of a running VM, memory and disk; it goes on. count: 1 to 64. env: on top, in each copy. Raises: as `create`."""
    body = body_of(ask(wire.ForkVm, count=count, env=env))
    return _call("POST", _path(vm_id, "fork"), Forked, wire.Forked, body, repeatable=False)


def clone(vm_id: str, wait: bool = True, snapshot_name: str | None = None) -> Call[Record]:
    """A new VM on a copy of the disk. snapshot_name: the snapshot behind it is kept, under this name."""
    body = body_of(ask(wire.CloneVm, snapshot_name=snapshot_name))
    return _call(
        "POST", _path(vm_id, "clone"), Record, wire.Cloned, body, params={"wait": _word(wait)}, repeatable=False
    )


def snapshot(vm_id: str, wait: bool = True, name: str | None = None) -> Call[Snapshot]:
    """A snapshot of the disk of a VM, which goes on.

    wait: until it has been booted once, so that VMs of it start fast; else it is `creating` until then.
    Raises: SnapshotError, DiskFull, QuotaExceededError.
    """
    body = body_of(ask(wire.SnapshotVm, name=name))
    params = {"wait": _word(wait)}
    path = _path(vm_id, "snapshot")
    return _call("POST", path, Snapshot, snapshots_wire.Snapshot, body, params=params, repeatable=False)


CALLS: Final[Mapping[str, Callable[..., Call[Any]]]] = {
    "create": create,
    "get": get,
    "list": list_,
    "list_all_records": list_all_records,
    "update": update,
    "delete": delete,
    "suspend": suspend,
    "resume": resume,
    "fork": fork,
    "clone": clone,
    "snapshot": snapshot,
}


def _call(
    method: Any,
    path: str,
    kind: Any,
    model: Any,
    body: bytes | None = None,
    *,
    params: Mapping[str, str] | None = None,
    repeatable: bool = True,
) -> Call[Any]:
    return Call(method, path, record(kind, model), body, params or {}, SLOW_S, repeatable)


def _path(vm_id: str, what: str = "") -> str:
    return f"/v1/vms/{segment(vm_id=vm_id)}{'/' + what if what else ''}"


def _word(flag: bool) -> str:
    return "true" if flag else "false"
