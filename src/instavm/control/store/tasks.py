"""Tasks: code that runs without a client waiting for it, and what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final

from sqlalchemy import BindParameter, Row, bindparam, delete, insert, select, update
from sqlalchemy.engine import Connection

from instavm.control.store.engine import Engine
from instavm.control.store.journal import Journal, Write
from instavm.control.store.schema import tasks
from instavm.control.store.seal import Seal

KEPT: Final = 1000
"""Tasks per tenant; of more, the oldest finished ones go."""
UNFINISHED: Final = ("pending", "running")

KEY: BindParameter[str] = bindparam("key")
ADD_TASK = insert(tasks)
CHANGE_TASK = update(tasks).where(tasks.c.id == KEY, tasks.c.status.in_(UNFINISHED))


@dataclass(frozen=True, slots=True)
class TaskRow:
    """`status`: pending, running, completed, failed (exit code not 0), timeout, killed. Times are seconds."""

    id: str
    tenant_id: str
    session_id: str
    language: str
    created_at: datetime
    status: str = "pending"
    vm_id: str | None = None
    reason: str | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    execution_time_s: float | None = None
    cpu_time_s: float | None = None
    command: str | None = field(default=None, repr=False)
    """Until it has ended, so that no server's end loses a task; it may hold secrets: kept sealed, and gone then."""
    timeout_s: float | None = None
    """What was asked for; None = for as long as its sandbox lives."""

    @property
    def complete(self) -> bool:
        return self.status not in UNFINISHED


class TaskRows:
    def __init__(self, engine: Engine, journal: Journal, seal: Seal) -> None:
        self._engine = engine
        self._journal = journal
        self._seal = seal

    def add(self, row: TaskRow) -> int:
        """Returns: the journal's mark."""
        return self._journal.append(Write(ADD_TASK, self._values(row)))

    def change(self, row: TaskRow) -> int:
        """Compare and set: a task that has ended stays as it ended. Returns: the journal's mark."""
        values = self._values(row)
        return self._journal.append(
            Write(CHANGE_TASK, {"key": values.pop("id"), **values}, f"task {row.id} has not ended")
        )

    async def load(self, tenant_id: str, task_id: str) -> TaskRow | None:
        await self._journal.written()
        ask = select(tasks).where((tasks.c.id == task_id) & (tasks.c.tenant_id == tenant_id))
        row = await self._engine.run(lambda connection: connection.execute(ask).one_or_none())
        return None if row is None else self._task(row)

    async def of_tenant(self, tenant_id: str, limit: int) -> list[TaskRow]:
        """Newest first."""
        await self._journal.written()
        ask = select(tasks).where(tasks.c.tenant_id == tenant_id).order_by(tasks.c.created_at.desc()).limit(limit)
        return [self._task(row) for row in await self._engine.run(lambda connection: connection.execute(ask).all())]

    async def unfinished(self) -> list[TaskRow]:
        ask = select(tasks).where(tasks.c.status.in_(UNFINISHED))
        return [self._task(row) for row in await self._engine.run(lambda connection: connection.execute(ask).all())]

    async def prune(self, tenant_id: str) -> None:
        """Forget the oldest finished tasks of a tenant that has more than `KEPT`."""

        def work(connection: Connection) -> None:
            mine = select(tasks.c.id).where(tasks.c.tenant_id == tenant_id, tasks.c.status.not_in(UNFINISHED))
            old = mine.order_by(tasks.c.created_at.desc()).offset(KEPT).limit(KEPT)
            connection.execute(delete(tasks).where(tasks.c.id.in_(old)))

        await self._engine.run(work)

    def _values(self, row: TaskRow) -> dict[str, Any]:
        return {**asdict(row), "command": None if row.command is None else self._seal.close(row.command)}

    def _task(self, row: Row[Any]) -> TaskRow:
        values = dict(row._mapping)
        command = None if row.command is None else self._seal.open(row.command)
        return TaskRow(**{**values, "truncated": bool(values["truncated"]), "command": command})
