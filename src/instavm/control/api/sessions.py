"""Routes of sessions: create, record, status, usage, sandboxes, kill."""

import uuid
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from instavm import limits
from instavm.contract.sandboxes import Started
from instavm.control.api.description import problems
from instavm.control.api.here import Caller, Here
from instavm.control.api.once import OnlyOnce
from instavm.control.causes import cause
from instavm.control.lifecycle import State, word
from instavm.control.sessions import Session
from instavm.control.store.sessions import VmRow
from instavm.errors import BadRequest, InvalidInput, UnsupportedOperationError
from instavm.wire import sessions as wire
from instavm.wire.egress import EgressPolicy
from instavm.wire.text import parsed

router = APIRouter(tags=["sessions"])


@router.post("/v1/sessions/session", response_model=wire.Session, responses=problems(403, 409))
async def create(ask: wire.CreateSession, once: OnlyOnce) -> Response:
    """Make a session. Its sandbox begins to boot; the answer does not wait for it."""
    caller, here = once.caller, once.here

    async def make(target: str | None) -> wire.Session:
        return _record(here, await here.sessions.create(caller, ask, target))

    return await once.create(make)


@router.get("/v1/sessions/session/{session_id}", responses=problems(404))
async def get(session_id: str, caller: Caller, here: Here) -> wire.Session:
    """The record of a session."""
    return _record(here, await here.sessions.get(caller, session_id))


@router.get("/v1/sessions/status/{session_id}", responses=problems(404))
async def status(session_id: str, caller: Caller, here: Here) -> wire.SessionStatus:
    """Whether the session's sandbox is alive."""
    return liveness(await here.sessions.get(caller, session_id))


@router.get("/v1/sessions/usage/{session_id}", responses=problems(404))
async def usage(session_id: str, caller: Caller, here: Here) -> wire.SessionUsage:
    """What the session has used so far."""
    session = await here.sessions.get(caller, session_id)
    used = session.usage()
    return wire.SessionUsage(
        session_id=uuid.UUID(session.id),
        execution_count=used.execution_count,
        total_execution_time=used.execution_time_s,
        cpu_time=used.cpu_time_s,
        vm_seconds=used.vm_seconds,
        memory_mb=session.row.memory_mib,
        vcpu_count=session.row.vcpus,
    )


@router.get("/v1/sessions/app-url/{session_id}", responses=problems(404, 501))
async def app_url(
    session_id: str, caller: Caller, here: Here, port: Annotated[int, Query(ge=1, le=65535)] = 80
) -> wire.AppUrl:
    """The address of a web server in the sandbox. This server has none to give: always 501 for a session of the caller's."""
    await here.sessions.get(caller, session_id)
    raise UnsupportedOperationError(
        f"this server does not forward connections to port {port} of a sandbox, so there is no address for it;"
        " ask the web server from inside the sandbox, with execute or a process"
    )


@router.get("/v1/sessions/sandboxes")
async def sandboxes(
    caller: Caller,
    here: Here,
    metadata: str | None = None,
    limit: Annotated[int, Query(ge=1, le=limits.LIST_LIMIT_MAX)] = limits.LIST_LIMIT_DEFAULT,
) -> list[wire.Sandbox]:
    """Sandboxes that are up or coming up, newest first. metadata: a JSON object; only sessions whose metadata contain it."""
    return [sandbox(one) for one in here.sessions.with_sandbox(caller, _wanted(metadata), limit)]


@router.post("/kill", responses=problems(404))
async def kill(ask: wire.Kill, caller: Caller, here: Here) -> wire.Killed:
    """End a session and its sandbox; nothing is left of the sandbox when this answers. Twice is fine."""
    try:
        session_id = uuid.UUID(ask.session_id)
    except ValueError:
        raise BadRequest("session_id", ask.session_id, limits.ALLOWED["session_id"]) from None
    session = await here.sessions.get(caller, str(session_id))
    return wire.Killed(vm_id=await here.sessions.kill(session), session_id=session_id)


def _record(here: Here, session: Session) -> wire.Session:
    """A session's record: the words of its latest sandbox, or `killed` once it is closed."""
    row, vm = session.row, session.latest()
    return wire.Session(
        session_id=uuid.UUID(row.id),
        status=_status(session, vm),
        reason=None if vm is None or vm.why is None else str(vm.why),
        error=None if vm is None else cause(vm),
        vm_id=None if vm is None else vm.id,
        created_at=row.created_at,
        expires_at=None if vm is None else vm.expires_at,
        vm_lifetime_seconds=row.lifetime_s,
        vcpu_count=row.vcpus,
        memory_mb=row.memory_mib,
        metadata=dict(row.metadata),
        env_keys=list(row.env_keys),
        egress_policy=EgressPolicy.of(*here.egress.of_session(session)),
        start=None if vm is None or vm.start is None else start(vm.start),
    )


def liveness(session: Session) -> wire.SessionStatus:
    """A sandbox counts as assigned from when it can be used: until then the session is good, and has none."""
    vm = session.latest()
    assigned = vm is not None and vm.state is not State.CREATING
    alive = assigned and vm is not None and vm.why is None and vm.state is not State.SUSPENDED
    live = session.vm if alive else None
    return wire.SessionStatus(
        session_id=uuid.UUID(session.id),
        exists=True,
        vm_assigned=assigned,
        vm_alive=alive,
        vm_status=word(vm.state, vm.why) if vm is not None and assigned else None,
        vm_id=vm.id if vm is not None and assigned else None,
        uptime_seconds=None if live is None else live.uptime_s(),
        expires_in_seconds=None if not assigned else live.remaining_s() if live is not None else 0.0,
        created_at=session.row.created_at,
    )


def sandbox(session: Session) -> wire.Sandbox:
    vm = session.vm
    assert vm is not None, "only sessions with a sandbox are listed"
    began = vm.started_at or vm.created_at
    return wire.Sandbox(
        sandbox_id=vm.id,
        session_id=uuid.UUID(session.id),
        name=session.row.image,
        metadata=dict(session.row.metadata),
        started_at=began,
        end_at=began + timedelta(seconds=vm.lifetime_s),
        status=word(vm.lifecycle.state, vm.lifecycle.why),
    )


def start(how: Started) -> wire.Start:
    return wire.Start(vm_id=how.vm_id, driver=how.driver, tier=how.tier, cold=how.cold, steps_ms=dict(how.steps_ms))


def _status(session: Session, vm: VmRow | None) -> str:
    if session.closed:
        return "killed"
    return "creating" if vm is None else word(vm.state, vm.why)


def _wanted(metadata: str | None) -> dict[str, Any]:
    """The filter, which comes as JSON text. Raises: InvalidInput."""
    try:
        wanted = parsed(metadata) if metadata else {}
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict):
        raise InvalidInput("metadata", metadata, limits.ALLOWED["metadata"])
    return wanted
