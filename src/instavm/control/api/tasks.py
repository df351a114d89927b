"""Routes of tasks: run code without waiting, ask for its result later."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from instavm import limits
from instavm.control.api.description import problems
from instavm.control.api.here import Caller, Here
from instavm.control.api.once import OnlyOnce
from instavm.control.store.tasks import TaskRow
from instavm.wire import tasks as wire

router = APIRouter(tags=["tasks"])


@router.post("/execute_async", response_model=wire.TaskBegun, responses=problems(403, 404, 409, 410))
async def begin(ask: wire.ExecuteAsync, once: OnlyOnce) -> Response:
    """Run code without waiting for it. The task is recorded when this answers, and runs whatever happens to the server."""
    caller, here = once.caller, once.here

    async def work() -> wire.TaskBegun:
        row = await here.tasks.begin(caller, ask)
        return wire.TaskBegun(
            task_id=row.id,
            session_id=row.session_id,
            status=row.status,
            language=row.language,
            created_at=row.created_at,
        )

    return await once.run(work)


@router.get("/v1/executions/", include_in_schema=False)
@router.get("/v1/executions")
async def listing(
    caller: Caller,
    here: Here,
    limit: Annotated[int, Query(ge=1, le=limits.LIST_LIMIT_MAX)] = limits.LIST_LIMIT_DEFAULT,
) -> list[wire.Task]:
    """Newest first."""
    return [record(row) for row in await here.tasks.list(caller, limit)]


@router.get("/v1/executions/{task_id}", responses=problems(404))
async def get(task_id: str, caller: Caller, here: Here) -> wire.Task:
    """A task and, once it is complete, its result."""
    return record(await here.tasks.get(caller, task_id))


def record(row: TaskRow) -> wire.Task:
    return wire.Task(
        task_id=row.id,
        session_id=row.session_id,
        vm_id=row.vm_id,
        status=row.status,
        is_complete=row.complete,
        language=row.language,
        exit_code=row.exit_code,
        stdout=row.stdout,
        stderr=row.stderr,
        serialized_stdout=row.stdout,
        serialized_stderr=row.stderr,
        execution_time=row.execution_time_s,
        cpu_time=row.cpu_time_s,
        truncated=row.truncated,
        reason=row.reason,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )
