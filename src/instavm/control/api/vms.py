"""Routes of VMs: the same sandboxes as those of sessions, by their own id."""

import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from instavm import limits
from instavm.contract.egress import Egress
from instavm.control.api import snapshots
from instavm.control.api.description import IN_SANDBOX, problems
from instavm.control.api.here import Caller, Here
from instavm.control.api.once import OnlyOnce
from instavm.control.api.sessions import start
from instavm.control.causes import cause
from instavm.control.lifecycle import STATES_OF_WORD, word
from instavm.control.sessions import Session
from instavm.control.store.sessions import SessionRow, VmRow
from instavm.errors import BootFailed, InvalidInput, NotFound, UnsupportedOperationError
from instavm.wire import vms as wire
from instavm.wire.egress import EgressPolicy
from instavm.wire.env import coerce
from instavm.wire.isolation import Isolation
from instavm.wire.snapshots import Snapshot

router = APIRouter(tags=["vms"])


@router.post("/v1/vms", response_model=wire.Vm, responses=IN_SANDBOX)
async def create(ask: wire.CreateVm, once: OnlyOnce, wait: bool = True) -> Response:
    """Make a VM. wait: until it is up; a boot that fails is then an error, and nothing is left."""
    caller, here = once.caller, once.here

    async def make(target: str | None) -> wire.Vm:
        if ask.session_id is None:
            image = None if ask.snapshot_id is None else (await here.snapshots.bootable(caller, ask.snapshot_id)).id
            session = await here.sessions.create(caller, ask, target, image)
        elif ask.snapshot_id is not None:
            raise InvalidInput("snapshot_id", ask.snapshot_id, "none, together with a session that is there already")
        else:
            session = await here.sessions.get(caller, ask.session_id)
            if ask.egress_policy is not None:
                await here.egress.set_session(session, ask.egress_policy.egress())
            here.sessions.begin(session)
        if wait:
            try:
                await here.sessions.ready(session)
            except BootFailed:
                await here.sessions.kill(session)
                raise
        latest = session.latest()
        assert latest is not None, "a session that was just given a sandbox has one"
        return await _record(here, session.row, latest)

    return await once.create(make)


@router.get("/v1/vms")
async def live(caller: Caller, here: Here) -> list[wire.Vm]:
    """Those that are up or coming up, newest first."""
    found = here.sessions.with_sandbox(caller, {}, limits.LIST_LIMIT_MAX)
    return await _records(here, [(one.row, row) for one in found if (row := one.latest()) is not None])


@router.get("/v1/vms/")
async def all_records(
    caller: Caller,
    here: Here,
    limit: Annotated[int, Query(ge=1, le=limits.LIST_LIMIT_MAX)] = limits.LIST_LIMIT_MAX,
    status: str | None = None,
) -> list[wire.Vm]:
    """Every VM that this account ever had, newest first. status: only those that have it, such as `failed`."""
    if status is not None and status not in STATES_OF_WORD:
        raise InvalidInput("status", status, "one of " + ", ".join(STATES_OF_WORD))
    return await _records(here, await here.sessions.all_vms(caller, limit, status))


@router.get("/v1/vms/{vm_id}", responses=problems(404))
async def get(vm_id: str, caller: Caller, here: Here) -> wire.Vm:
    """The record of a VM, up or long gone."""
    session, vm = await here.sessions.of_vm(caller, vm_id)
    return await _record(here, session.row, vm)


@router.patch("/v1/vms/{vm_id}", responses=problems(403, 404, 409, 501))
async def update(vm_id: str, ask: wire.UpdateVm, caller: Caller, here: Here) -> wire.Vm:
    """Change a VM's metadata, lifetime and options; what is left out stays."""
    session, vm = await _up(here, caller, vm_id)
    if ask.memory_mb not in (None, session.row.memory_mib):
        raise UnsupportedOperationError(
            f"memory_mb: {vm.id} has {session.row.memory_mib} MB for as long as it lives, not {ask.memory_mb};"
            " snapshot it and make a VM of another size from the snapshot"
        )
    labels = ask.metadata if "metadata" in ask.model_fields_set else None
    await here.sessions.change(caller, session, labels, ask.options(), ask.vm_lifetime_seconds)
    return await _record(here, session.row, session.latest() or vm)


@router.delete("/v1/vms/{vm_id}", responses=problems(404))
async def delete(vm_id: str, caller: Caller, here: Here) -> wire.Deleted:
    """End a VM and its session; nothing is left of it when this answers."""
    session, vm = await _up(here, caller, vm_id)
    await here.sessions.kill(session)
    return wire.Deleted(vm_id=vm.id)


@router.post("/v1/vms/{vm_id}/stage-env", responses=IN_SANDBOX)
async def stage_env(vm_id: str, ask: wire.StageEnv, caller: Caller, here: Here) -> wire.Staged:
    """Set environment variables for everything that starts in the VM from now on."""
    session, _ = await _up(here, caller, vm_id)
    try:
        env: Any = coerce({entry.env_name: entry.value for entry in ask.entries})
    except ValueError as exc:
        raise InvalidInput("entries", str(exc), limits.ALLOWED["env"]) from None
    await here.vms.stage_env(await here.sessions.ready(session), env)
    return wire.Staged(vm_id=vm_id, env_keys=sorted(env))


@router.post("/v1/vms/{vm_id}/suspend", responses=IN_SANDBOX)
async def suspend(vm_id: str, caller: Caller, here: Here) -> wire.Suspended:
    """Save a VM to disk, memory included, and end it. It uses no memory of the host until it is resumed."""
    session, _ = await _up(here, caller, vm_id)
    row, stored = await here.sessions.suspend(session)
    return wire.Suspended(
        status=word(row.state, row.why),
        vm_id=row.id,
        session_id=uuid.UUID(session.id),
        size_bytes=None if stored is None else stored.own_bytes,
        pause_ms=None if stored is None else stored.pause_ms,
    )


@router.post("/v1/vms/{vm_id}/resume", responses=IN_SANDBOX)
async def resume(vm_id: str, caller: Caller, here: Here, wait: bool = True) -> wire.Resumed:
    """Bring a suspended VM back, under a new id. wait: until it is up."""
    session, _ = await _up(here, caller, vm_id)
    vm = await here.sessions.resume(session, wait=wait)
    status = "active" if vm.settled.is_set() else "resuming"
    return wire.Resumed(vm_id=vm.id, session_id=uuid.UUID(session.id), status=status, previous_vm_id=vm_id)


@router.post("/v1/vms/{vm_id}/fork", response_model=wire.Forked, responses=IN_SANDBOX)
async def fork(vm_id: str, ask: wire.ForkVm, once: OnlyOnce) -> Response:
    """Copy a running VM, memory and disk, into sessions of their own. All copies are made, or none."""
    caller, here = once.caller, once.here

    async def make() -> wire.Forked:
        session, vm = await _up(here, caller, vm_id)
        forks = []
        for one in await here.sessions.fork(caller, session, ask.count, ask.env):
            assert one.vm is not None
            how = None if one.vm.started is None else start(one.vm.started)
            status = word(one.vm.lifecycle.state, one.vm.lifecycle.why)
            forks.append(wire.Fork(vm_id=one.vm.id, session_id=uuid.UUID(one.id), status=status, start=how))
        return wire.Forked(parent_vm_id=vm.id, forks=forks)

    return await once.run(make)


@router.post("/v1/vms/{vm_id}/snapshot", response_model=Snapshot, responses=IN_SANDBOX)
async def snapshot(vm_id: str, once: OnlyOnce, ask: wire.SnapshotVm | None = None, wait: bool = True) -> Response:
    """Its disk is kept when this answers. wait: until it has been booted once and is `ready`; else it is `creating`."""
    caller, here = once.caller, once.here

    async def make() -> Snapshot:
        session, _ = await _up(here, caller, vm_id)
        name = None if ask is None else ask.name
        return snapshots.record(await here.snapshots.take(caller, session, name, wait=wait))

    return await once.run(make)


@router.post("/v1/vms/{vm_id}/clone", response_model=wire.Cloned, responses=IN_SANDBOX)
async def clone(vm_id: str, once: OnlyOnce, ask: wire.CloneVm | None = None, wait: bool = True) -> Response:
    """A new VM on a snapshot of the disk. The snapshot is kept when it was given a name."""
    caller, here = once.caller, once.here

    async def make() -> wire.Cloned:
        session, _ = await _up(here, caller, vm_id)
        name = None if ask is None else ask.snapshot_name
        taken = await here.snapshots.take(caller, session, name, boot=False)
        row = session.row
        wanted = wire.CreateVm(
            vm_lifetime_seconds=row.lifetime_s,
            vcpu_count=row.vcpus,
            memory_mb=row.memory_mib,
            metadata=dict(row.metadata),
            env=dict(session.env),
        )
        try:
            child = await here.sessions.create(caller, wanted, image=taken.id)
            if wait or name is None:
                await here.sessions.ready(child)
        finally:
            if name is None:
                await here.snapshots.remove(caller, taken.id)
        latest = child.latest()
        assert latest is not None
        return wire.Cloned(
            vm_id=latest.id,
            session_id=uuid.UUID(child.id),
            status=word(latest.state, latest.why),
            snapshot_id=taken.id,
            snapshot_deleted=name is None,
        )

    return await once.run(make)


@router.get("/v1/vms/{vm_id}/isolation", responses=IN_SANDBOX)
async def isolation(vm_id: str, caller: Caller, here: Here) -> Isolation:
    """What confines it at this moment, signed with its host's key."""
    session, _ = await _up(here, caller, vm_id)
    told = await here.vms.isolation(await here.sessions.ready(session))
    return Isolation(report=dict(told.report), signature=told.signature, public_key=told.public_key)


async def _up(here: Here, caller: Caller, vm_id: str) -> tuple[Session, VmRow]:
    """A VM that has not ended. Raises: NotFound."""
    session, vm = await here.sessions.of_vm(caller, vm_id)
    if vm.why is not None:
        raise NotFound(f"VM {vm_id[:80]} has ended ({vm.why})")
    return session, vm


async def _record(here: Here, session: SessionRow, vm: VmRow) -> wire.Vm:
    (told,) = await _records(here, [(session, vm)])
    return told


async def _records(here: Here, found: Sequence[tuple[SessionRow, VmRow]]) -> list[wire.Vm]:
    egress = await here.egress.of_vms([vm for _, vm in found])
    return [record(session, vm, egress.get(vm.id)) for session, vm in found]


def record(session: SessionRow, vm: VmRow, egress: tuple[Egress, bool] | None) -> wire.Vm:
    return wire.Vm(
        vm_id=vm.id,
        id=vm.id,
        session_id=uuid.UUID(session.id),
        status=word(vm.state, vm.why),
        reason=None if vm.why is None else str(vm.why),
        error=cause(vm),
        console=(vm.console or "").splitlines(),
        created_at=vm.created_at,
        started_at=vm.started_at,
        expires_at=vm.expires_at,
        terminated_at=vm.ended_at,
        vm_lifetime_seconds=session.lifetime_s,
        vcpu_count=session.vcpus,
        memory_mb=session.memory_mib,
        metadata=dict(session.metadata),
        env_keys=list(session.env_keys),
        egress_policy=None if egress is None else EgressPolicy.of(*egress),
        snapshot_id=None if session.image == "default" else session.image,
        **{name: value for name, value in session.options.items() if name in wire.OPTIONS},
    )
