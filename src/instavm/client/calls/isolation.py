"""The call that asks what confines a sandbox."""

from __future__ import annotations

from instavm.client.calls.base import Call, reading, segment
from instavm.client.results import Isolation
from instavm.wire import isolation as wire


def get(vm_id: str) -> Call[Isolation]:
    read = reading(wire.Isolation)
    path = f"/v1/vms/{segment(vm_id=vm_id)}/isolation"
    return Call("GET", path, lambda raw: Isolation(read(raw).model_dump(mode="json")))
