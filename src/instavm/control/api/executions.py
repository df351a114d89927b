"""Routes of executions: run code and wait."""

from fastapi import APIRouter

from instavm.control.api.here import Caller, Here
from instavm.control.api.sessions import start
from instavm.wire import executions as wire

router = APIRouter()


@router.post("/execute")
async def execute(ask: wire.Execute, caller: Caller, here: Here) -> wire.Execution:
    ran = await here.executions.execute(caller, ask)
    outcome = ran.outcome
    return wire.Execution(
        stdout=outcome.stdout,
        stderr=outcome.stderr,
        exit_code=outcome.exit_code,
        execution_time=outcome.execution_time_s,
        cpu_time=outcome.cpu_time_s,
        session_id=ran.session_id,
        language=ask.language,
        timed_out=outcome.timed_out,
        truncated=outcome.truncated,
        reason=outcome.reason,
        vm_id=ran.vm_id,
        timing=None if ran.start is None else start(ran.start),
    )
