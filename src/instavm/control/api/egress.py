"""Routes of egress policies: of a session, of a VM, and what they did."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query

from instavm import limits, refusals
from instavm.contract.egress import EgressLog
from instavm.control.api.description import IN_SANDBOX, problems
from instavm.control.api.here import Caller, Here
from instavm.control.control import Control
from instavm.control.sessions import Session
from instavm.wire import egress as wire

router = APIRouter(tags=["egress"])

Host = Annotated[str, Query(min_length=1, max_length=limits.HOST_CHARS)]
Port = Annotated[int, Query(ge=1, le=65535)]
Protocol = Literal["tcp", "udp"]


@router.post("/v1/egress/session/{session_id}", responses=IN_SANDBOX)
async def set_session(session_id: str, ask: wire.SetEgress, caller: Caller, here: Here) -> wire.EgressPolicy:
    """In force when it is answered; with no sandbox yet, from the first moment of the next one."""
    session = await here.sessions.get(caller, session_id)
    applied = await here.egress.set_session(session, ask.egress())
    return wire.EgressPolicy.of(ask.egress(), applied)


@router.get("/v1/egress/session/{session_id}", responses=problems(404))
async def get_session(session_id: str, caller: Caller, here: Here) -> wire.EgressPolicy:
    """The egress policy of a session."""
    egress, up = here.egress.of_session(await here.sessions.get(caller, session_id))
    return wire.EgressPolicy.of(egress, up)


@router.post("/v1/egress/vm/{vm_id}", responses=IN_SANDBOX)
async def set_vm(vm_id: str, ask: wire.SetEgress, caller: Caller, here: Here) -> wire.EgressPolicy:
    """Set the egress policy of one VM. It is applied when this answers."""
    session, vm = await here.sessions.of_vm(caller, vm_id)
    await here.egress.set_vm(session, vm.id, ask.egress())
    return wire.EgressPolicy.of(ask.egress(), True)


@router.get("/v1/egress/vm/{vm_id}", responses=problems(404, 410))
async def get_vm(vm_id: str, caller: Caller, here: Here) -> wire.EgressPolicy:
    """The egress policy of one VM."""
    session, vm = await here.sessions.of_vm(caller, vm_id)
    egress, up = here.egress.of_vm(session, vm.id)
    return wire.EgressPolicy.of(egress, up)


@router.get("/v1/egress/session/{session_id}/log", responses=problems(404, 409, 410))
async def session_log(session_id: str, caller: Caller, here: Here) -> wire.EgressLog:
    """Where its latest sandbox went, or tried to: at most some hundred destinations, with counts; also once that has ended."""
    return _log(*await here.egress.log(await here.sessions.get(caller, session_id)))


@router.get("/v1/egress/vm/{vm_id}/log", responses=problems(404, 409, 410))
async def vm_log(vm_id: str, caller: Caller, here: Here) -> wire.EgressLog:
    """As the log of a session, of one VM."""
    session, _ = await here.sessions.of_vm(caller, vm_id)
    return _log(*await here.egress.log(session, vm_id))


@router.get("/v1/egress/session/{session_id}/check", responses=problems(404, 409, 410))
async def check_session(
    session_id: str, caller: Caller, here: Here, host: Host, port: Port = 443, protocol: Protocol = "tcp"
) -> wire.EgressCheck:
    """Whether the session's sandbox may reach `host`, by which rule, and what to do if not. Nothing is connected to."""
    ask = wire.CheckEgress(host=host, port=port, protocol=protocol)
    return await _check(here, await here.sessions.get(caller, session_id), ask)


@router.post("/v1/egress/session/{session_id}/check", responses=problems(404, 409, 410))
async def try_session(session_id: str, ask: wire.CheckEgress, caller: Caller, here: Here) -> wire.EgressCheck:
    """The same under a policy that is not set, as a trial."""
    return await _check(here, await here.sessions.get(caller, session_id), ask)


@router.get("/v1/egress/vm/{vm_id}/check", responses=problems(404, 409, 410))
async def check_vm(
    vm_id: str, caller: Caller, here: Here, host: Host, port: Port = 443, protocol: Protocol = "tcp"
) -> wire.EgressCheck:
    """As the check of a session, of one VM."""
    session, vm = await here.sessions.of_vm(caller, vm_id)
    here.egress.of_vm(session, vm.id)
    return await _check(here, session, wire.CheckEgress(host=host, port=port, protocol=protocol))


@router.post("/v1/egress/vm/{vm_id}/check", responses=problems(404, 409, 410))
async def try_vm(vm_id: str, ask: wire.CheckEgress, caller: Caller, here: Here) -> wire.EgressCheck:
    """As the check of a session, of one VM."""
    session, vm = await here.sessions.of_vm(caller, vm_id)
    here.egress.of_vm(session, vm.id)
    return await _check(here, session, ask)


async def _check(here: Control, session: Session, ask: wire.CheckEgress) -> wire.EgressCheck:
    policy = None if ask.policy is None else ask.policy.egress()
    checked = await here.egress.check(session, ask.host, ask.port, ask.protocol, policy)
    said = checked.decision
    return wire.EgressCheck(
        host=ask.host,
        port=ask.port,
        protocol=ask.protocol,
        allowed=said.allowed,
        rule=said.rule,
        source=checked.source,
        detail=refusals.why(said.rule),
        remedy=None
        if said.allowed
        else refusals.remedy(said.rule, said.name, said.address, ask.port, registry=said.registry),
        vm_id=checked.vm_id,
        applied=checked.applied,
    )


def _log(vm_id: str, log: EgressLog) -> wire.EgressLog:
    entries = [
        wire.EgressEntry(
            name=one.name,
            address=one.address,
            port=one.port,
            protocol=one.protocol,
            allowed=one.allowed,
            rule=one.rule,
            count=one.count,
            first_at=None if one.first_at is None else datetime.fromtimestamp(one.first_at, UTC),
            last_at=None if one.last_at is None else datetime.fromtimestamp(one.last_at, UTC),
            registry=one.registry,
        )
        for one in log.seen
    ]
    return wire.EgressLog(
        vm_id=vm_id,
        entries=entries,
        bytes_sent=log.bytes_sent,
        bytes_received=log.bytes_received,
        open_connections=log.open_connections,
    )
