"""Routes of snapshots: build, list, look at, follow, cancel, remove, clear up."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from instavm.contract.snapshots import Stored
from instavm.control.api.description import problems
from instavm.control.api.here import Caller, Here
from instavm.control.api.once import OnlyOnce
from instavm.control.snapshots import complete
from instavm.control.store.snapshots import SnapshotRow
from instavm.wire import snapshots as wire

router = APIRouter(tags=["snapshots"])


@router.post("/v1/snapshots", response_model=wire.Snapshot, responses=problems(403, 409))
async def create(ask: wire.CreateSnapshot, once: OnlyOnce) -> Response:
    """Begin to build a snapshot of an OCI image; the answer does not wait for it."""
    caller, here = once.caller, once.here

    async def make(_target: str | None) -> wire.Snapshot:
        return record(await here.snapshots.build(caller, ask))

    return await once.create(make)


@router.get("/v1/snapshots")
async def listing(
    caller: Caller, here: Here, type: Annotated[Literal["user", "system"] | None, Query()] = None
) -> list[wire.Snapshot]:
    """Newest first: this account's, and the system's."""
    sizes = await here.snapshots.sizes()
    return [record(row, sizes.get(row.id)) for row in await here.snapshots.of(caller, type)]


@router.get("/v1/snapshots/{snapshot_id}", responses=problems(404))
async def get(snapshot_id: str, caller: Caller, here: Here) -> wire.Snapshot:
    """The record of a snapshot."""
    return record(await here.snapshots.get(caller, snapshot_id), (await here.snapshots.sizes()).get(snapshot_id))


@router.get("/v1/snapshots/{snapshot_id}/logs", responses=problems(404))
async def logs(
    snapshot_id: str, caller: Caller, here: Here, offset: Annotated[int, Query(ge=0)] = 0
) -> wire.SnapshotLog:
    """What the build of a snapshot has printed so far."""
    build = await here.snapshots.log_of(caller, snapshot_id)
    return wire.SnapshotLog(
        snapshot_id=build.row.id,
        status=build.row.status,
        log=build.text[max(0, offset - build.left_out) :],
        next_offset=build.left_out + len(build.text),
        is_complete=complete(build.row),
        stage=build.stage,
        progress=build.progress,
    )


@router.post("/v1/snapshots/garbage")
async def garbage(caller: Caller, here: Here, dry_run: bool = False) -> wire.Garbage:
    """Remove what takes disk on the server and belongs to nothing any more."""
    return wire.Garbage(removed=await here.snapshots.clear_up(dry_run=dry_run), dry_run=dry_run)


@router.post("/v1/snapshots/{snapshot_id}/cancel", responses=problems(404))
async def cancel(snapshot_id: str, caller: Caller, here: Here) -> wire.Snapshot:
    """Stop a build. One that is over stays as it is."""
    return record(await here.snapshots.cancel(caller, snapshot_id))


@router.delete("/v1/snapshots/{snapshot_id}", responses=problems(403, 404, 409))
async def delete(snapshot_id: str, caller: Caller, here: Here) -> wire.DeletedSnapshot:
    """Remove a snapshot. Sandboxes that run from it keep running."""
    return wire.DeletedSnapshot(snapshot_id=(await here.snapshots.remove(caller, snapshot_id)).id)


def record(row: SnapshotRow, stored: Stored | None = None) -> wire.Snapshot:
    return wire.Snapshot(
        id=row.id,
        snapshot_id=row.id,
        name=row.name,
        status=row.status,
        type=row.type,
        snapshot_type=row.type,
        oci_image=row.oci_image,
        oci_digest=row.digest,
        vm_id=row.vm_id,
        size_bytes=row.size_bytes if stored is None else stored.own_bytes + stored.shared_bytes,
        shared_bytes=0 if stored is None else stored.shared_bytes,
        last_error=row.last_error,
        error=row.last_error,
        message=row.last_error,
        created_at=row.created_at,
        finished_at=row.finished_at,
        is_public=row.type == "system",
        vcpu_count=row.vcpus,
        memory_mb=row.memory_mib,
        build_args=dict(row.build_args),
        labels=dict(row.labels),
    )
