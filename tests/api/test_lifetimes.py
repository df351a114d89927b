"""Lifetimes and restarts, below HTTP: where a test can hand in times that the API would refuse."""

import pytest
from local_node import open_local_node

from instavm.contract.sandboxes import EndReason
from instavm.control.accounts import LocalAccounts
from instavm.control.control import open_control
from instavm.control.lifecycle import State
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import open_store
from instavm.errors import HostNotReady, SessionEnded
from instavm.wire.executions import Execute
from instavm.wire.sessions import CreateSession
from instavm.wire.snapshots import CreateSnapshot
from instavm.wire.vms import CreateVm

pytestmark = pytest.mark.anyio

ME = Tenant("local", "me", None)


def ask(**more):
    return CreateSession.model_construct(**{**CreateSession().model_dump(), **more})


async def test_a_sandbox_ends_when_its_lifetime_runs_out(tmp_path):
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        session = await control.sessions.create(ME, ask(vm_lifetime_seconds=0.01))
        vm = session.vm
        await vm.gone.wait()
        assert (vm.lifecycle.state, vm.lifecycle.why) == (State.ENDED, EndReason.LIFETIME)
        assert vm.uptime_s() >= 0.01
        assert not node.places


@pytest.mark.parametrize("ends", ["lifetime", "server"])
async def test_a_snapshot_is_taken_before_the_end(tmp_path, ends):
    options = {"snapshot_on_terminate": True, "snapshot_name": "last"}
    options |= {"vm_lifetime_seconds": 0.01} if ends == "lifetime" else {}
    wanted = CreateVm.model_construct(**{**CreateVm().model_dump(), **options})
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with open_control(node, store, LocalAccounts(store.accounts)) as control:
            session = await control.sessions.create(ME, wanted)
            if ends == "lifetime":
                await session.vm.gone.wait()
            else:
                await session.vm.settled.wait()
        (row,) = await store.snapshots.of_tenant("local", None)
        assert (row.name, row.status, row.vm_id) == ("last", "ready", session.vm.id)
        assert row.id in await node.stored() and not node.places


async def test_builds_end_with_their_server(tmp_path):
    """It does not wait for them, and they are not found `building` by the next one."""
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with open_control(node, store, LocalAccounts(store.accounts)) as control:
            row = await control.snapshots.build(ME, CreateSnapshot(oci_image="hangs:1"))
        (kept,) = await store.snapshots.of_tenant("local", None)
        assert (kept.id, kept.status) == (row.id, "failed") and "the server ended" in kept.last_error


async def test_the_clock_on_the_wall_decides_nothing(tmp_path, monkeypatch):
    """A wall clock that is set an hour ahead ends nobody."""
    import datetime as real

    from instavm.control import vms

    class Ahead(real.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + real.timedelta(hours=1)

    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        session = await control.sessions.create(ME, ask(vm_lifetime_seconds=60))
        await session.vm.settled.wait()
        monkeypatch.setattr(vms, "datetime", Ahead)
        assert session.vm.usable
        assert 50 < session.vm.remaining_s() <= 60


async def test_stopping_ends_everything_and_takes_nothing_new(tmp_path):
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        for _ in range(3):
            await control.sessions.create(ME, ask())
        await control.stop()
        assert len(control.vms) == 0
        assert not node.places
        with pytest.raises(HostNotReady, match="stopping"):
            await control.sessions.create(ME, ask())


async def test_a_restarted_server_knows_its_sessions_and_that_their_sandboxes_are_gone(tmp_path):
    """Killed ones stay killed; the others get a fresh sandbox, without the environment, which was never
    stored.
    """
    async with open_local_node() as node:
        async with (
            open_store(tmp_path / "db") as store,
            open_control(node, store, LocalAccounts(store.accounts)) as control,
        ):
            kept = (await control.sessions.create(ME, ask(env={"TOKEN": "s3cret"}))).id
            await control.executions.execute(ME, Execute(command="1", session_id=kept))
            killed = await control.sessions.create(ME, ask())
            await control.sessions.kill(killed)
        assert b"s3cret" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
        async with (
            open_store(tmp_path / "db") as store,
            open_control(node, store, LocalAccounts(store.accounts)) as control,
        ):
            session = await control.sessions.get(ME, kept)
            assert session.latest().why is EndReason.SERVER_STOPPED
            assert session.usage().execution_count == 1
            assert session.usage().vm_seconds > 0
            see = "import os; print(os.getenv('TOKEN'))"
            ran = await control.executions.execute(ME, Execute(command=see, session_id=kept))
            assert ran.outcome.stdout == "None\n"
            assert session.row.env_keys == ("TOKEN",)
            with pytest.raises(SessionEnded):
                await control.executions.execute(ME, Execute(command="1", session_id=killed.id))


async def test_sandboxes_of_a_server_that_was_killed_are_lost(tmp_path):
    """Its store still says that they are up; the node of the next server does not have them."""
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        session_id = (await control.sessions.create(ME, ask())).id
        await (await control.sessions.get(ME, session_id)).vm.settled.wait()
        await store.journal.written()
        async with (
            open_local_node() as empty,
            open_store(tmp_path / "db") as after,
            open_control(empty, after, LocalAccounts(after.accounts)),
        ):
            _, vm = await after.sessions.load("local", session_id)
            assert (vm.state, vm.why) == (State.ENDED, EndReason.NODE_LOST)


async def test_a_database_of_another_version_is_refused(tmp_path):
    import sqlite3

    async with open_store(tmp_path / "db"):
        pass
    with sqlite3.connect(tmp_path / "db") as raw:
        raw.execute("UPDATE schema_version SET version = 99")
    raw.close()
    with pytest.raises(HostNotReady, match="schema version 99"):
        async with open_store(tmp_path / "db"):
            pass
    assert (tmp_path / "db").stat().st_mode & 0o777 == 0o600


async def test_a_locked_database_stops_no_running_sandbox(tmp_path):
    """Code runs on while another program holds the database; what happened meanwhile is written afterwards,
    once.
    """
    import sqlite3

    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        session = await control.sessions.create(ME, ask())
        await control.executions.execute(ME, Execute(command="1", session_id=session.id))
        await store.journal.written()
        other = sqlite3.connect(tmp_path / "db")
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            ran = await control.executions.execute(ME, Execute(command="print(1)", session_id=session.id))
            assert ran.outcome.stdout == "1\n"
        other.rollback()
        other.close()
        row, _ = await store.sessions.load(session.row.tenant_id, session.id)
        assert row.usage.execution_count == 4


async def test_a_hundred_lifetimes_run_out_and_nothing_survives(tmp_path):
    """Nobody ends before its deadline, and afterwards nobody is left."""
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        sessions = [await control.sessions.create(ME, ask(vm_lifetime_seconds=0.5)) for _ in range(100)]
        for session in sessions:
            await session.vm.gone.wait()
        assert {session.vm.lifecycle.why for session in sessions} == {EndReason.LIFETIME}
        assert min(session.vm.uptime_s() for session in sessions) >= 0.5
        assert (len(control.vms), node.places) == (0, {})
