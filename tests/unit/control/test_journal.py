"""The writer of the database: entries are whole, and a step that finds something else than it expects is an error."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy import event

from instavm.contract.sandboxes import EndReason
from instavm.control.lifecycle import State
from instavm.control.store.database import open_store
from instavm.control.store.journal import BATCH
from instavm.control.store.sessions import SessionRow, VmRow
from instavm.control.store.snapshots import SnapshotRow
from instavm.control.store.tasks import TaskRow
from instavm.errors import Conflict, InstaVMError

pytestmark = pytest.mark.anyio
NOW = datetime(2026, 1, 2, tzinfo=UTC)
SESSION = SessionRow("s1", "local", NOW, None, 300, 2, 512, "default", {}, ())
VM = VmRow("vm-1", "s1", State.CREATING, None, NOW)
TASK = TaskRow("tsk_1", "local", "s1", "python", NOW)
SNAPSHOT = SnapshotRow("snap-1", "local", None, "user", "creating", NOW, 2, 512)


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
async def store(tmp_path):
    async with open_store(tmp_path / "db") as store:
        store.sessions.add(SESSION)
        store.sessions.add_vm(VM)
        await store.journal.written()
        yield store


async def test_a_step_of_a_sandbox_that_was_taken_already_is_an_error(store, caplog):
    active = replace(VM, state=State.ACTIVE)
    store.sessions.move_vm(active, State.CREATING, NOW, None, 0.0)
    store.sessions.move_vm(active, State.CREATING, NOW, None, 0.0)
    await store.journal.written()
    assert "VM vm-1 is creating" in caplog.text
    assert [name for name, *_ in await store.sessions.events("s1")] == ["session.created", "vm.creating", "vm.active"]


async def test_the_end_of_a_sandbox_that_somebody_else_recorded_is_not_recorded_again(store, caplog):
    store.sessions.lose_vm(VM, EndReason.NODE_LOST, "it did not outlive the server")
    store.sessions.lose_vm(VM, EndReason.KILLED, "killed")
    _, vm = await store.sessions.load("local", "s1")
    assert (vm.state, vm.why) == (State.ENDED, EndReason.NODE_LOST)
    assert "VM vm-1 is creating" in caplog.text


async def test_a_session_is_closed_once(store):
    await store.journal.written(store.sessions.close("s1", NOW))
    with pytest.raises(Conflict, match="session s1 is open"):
        await store.journal.written(store.sessions.close("s1", NOW))
    with pytest.raises(Conflict, match="session s1 is open"):
        await store.journal.written(store.sessions.change(replace(SESSION, lifetime_s=400), None))


async def test_a_task_ends_once(store):
    await store.journal.written(store.tasks.add(TASK))
    await store.journal.written(store.tasks.change(replace(TASK, status="completed", stdout="first")))
    with pytest.raises(Conflict, match="task tsk_1 has not ended"):
        await store.journal.written(store.tasks.change(replace(TASK, status="killed")))
    assert (await store.tasks.load("local", "tsk_1")).stdout == "first"


async def test_a_snapshot_that_was_removed_while_it_was_made_does_not_become_ready(store):
    store.snapshots.add(SNAPSHOT)
    store.snapshots.remove("snap-1")
    with pytest.raises(Conflict, match="snapshot snap-1 is being made"):
        await store.journal.written(store.snapshots.change(replace(SNAPSHOT, status="ready")))


async def test_what_the_database_refuses_is_told_to_who_waits_for_it_and_to_nobody_else(store):
    good = [store.tasks.add(replace(TASK, id=f"tsk_good{n}")) for n in range(2)]
    for bad in (replace(TASK, id="tsk_good0"), replace(TASK, id="tsk_bad", stdout="\ud800")):
        with pytest.raises(InstaVMError, match="could not be written"):
            await store.journal.written(store.tasks.add(bad))
    good.append(store.tasks.add(replace(TASK, id="tsk_good2")))
    for mark in good:
        await store.journal.written(mark)
    assert len(await store.tasks.of_tenant("local", 10)) == 3


async def test_the_writes_of_one_entry_are_in_one_transaction(store):
    """Also where the entries before it fill a batch all but one."""
    transactions = []

    def note(_connection, _cursor, sql, values, *_):
        if sql.startswith("BEGIN"):
            transactions.append([])
        transactions[-1].append((sql, str(values)))

    event.listen(store.sessions._engine._engine, "before_cursor_execute", note)
    for _ in range(BATCH - 1):
        store.sessions.used("s1", execution_time_s=0.1, cpu_time_s=0.1)
    store.sessions.move_vm(replace(VM, state=State.ACTIVE), State.CREATING, NOW, None, 0.0)
    store.sessions.close("s1", NOW)
    await store.journal.written()
    (moved,) = [one for one in transactions if any("UPDATE vms" in sql for sql, _ in one)]
    (told,) = [one for one in transactions if any("vm.active" in values for _, values in one)]
    assert moved is told
    (closed,) = [one for one in transactions if any("closed_at=" in sql for sql, _ in one)]
    assert any("session.closed" in values for _, values in closed)


async def test_what_is_committed_is_synced(store):
    """A power cut takes nothing of what was answered for: SQLite's FULL (2) syncs its log with each commit."""
    found = await store.sessions._engine.run(
        lambda connection: connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
    )
    assert found == 2
