"""Routes of executions: run code and wait."""

from fastapi import APIRouter
from starlette.responses import Response

from instavm import limits
from instavm.contract.egress import Seen
from instavm.control.api.description import IN_SANDBOX
from instavm.control.api.once import OnlyOnce
from instavm.control.api.patience import Patient
from instavm.control.api.sessions import start
from instavm.control.executions import Ran
from instavm.wire import executions as wire
from instavm.wire.text import presentable, shown

router = APIRouter(tags=["executions"])


@router.post("/execute", response_model=wire.Execution, responses=IN_SANDBOX)
async def execute(ask: wire.Execute, once: OnlyOnce) -> Response:
    """Run code to its end. Without `session_id` in a session made for it, which the answer names.

    The status is 200 whatever becomes of the code: `exit_code`, `reason` and `stderr` tell. An answer that takes long begins
    before its result is there; an error is then told in its body, as `code` and `detail`. When the caller goes away, the code is
    stopped; not so with an `Idempotency-Key`, under which its result can be asked for again.
    """
    caller, here = once.caller, once.here

    async def work() -> wire.Execution:
        return result(ask.language, await here.executions.execute(caller, ask))

    patience_s = limits.EXECUTE_TIMEOUT_S_DEFAULT if ask.timeout is None else ask.timeout
    return Patient(lambda: once.run(work), patience_s, stops=not once.repeatable)


def result(language: str, ran: Ran) -> wire.Execution:
    outcome = ran.outcome
    return wire.Execution(
        stdout=shown(outcome.stdout),
        stderr=shown(outcome.stderr),
        exit_code=outcome.exit_code,
        execution_time=outcome.execution_time_s,
        cpu_time=outcome.cpu_time_s,
        session_id=ran.session_id,
        language=language,
        timed_out=outcome.timed_out,
        truncated=outcome.truncated,
        reason=outcome.reason,
        signal=outcome.signal,
        peak_memory_bytes=outcome.peak_memory_bytes,
        outputs=[presentable(dict(bundle)) for bundle in outcome.outputs],
        refused=[_refusal(one) for one in outcome.refused],
        vm_id=ran.vm_id,
        timing=None if ran.start is None else start(ran.start),
    )


def _refusal(one: Seen) -> wire.Refusal:
    return wire.Refusal(
        name=one.name,
        address=one.address,
        port=one.port,
        protocol=one.protocol,
        rule=one.rule,
        count=one.count,
        registry=one.registry,
    )
