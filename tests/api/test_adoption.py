"""A server that comes back: what lives is adopted, what should not is ended, and the records say so."""

from datetime import UTC, datetime, timedelta

import anyio
import pytest
from local_node import open_local_node
from sqlalchemy import update

from instavm.contract.sandboxes import EndReason, SandboxSpec
from instavm.control.accounts import LocalAccounts
from instavm.control.control import open_control
from instavm.control.lifecycle import State
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import open_store
from instavm.control.store.schema import vms
from instavm.errors import HostNotReady
from instavm.wire.executions import Execute
from instavm.wire.sessions import CreateSession
from instavm.wire.tasks import ExecuteAsync

pytestmark = pytest.mark.anyio
ME = Tenant("local", "me", None)


def served(node, store):
    return open_control(node, store, LocalAccounts(store.accounts))


async def left(node, store, **values):
    """A session with a sandbox that a server has left, and what the records came to say of it. Returns: its id."""
    async with served(node, store) as control:
        session_id = (await control.sessions.create(ME, CreateSession())).id
        await run(control, session_id, "x = 1")
        await control.leave()
    await store.journal.written()
    change = update(vms).values(**values)
    await store.sessions._engine.run(lambda connection: connection.execute(change))
    return session_id


async def run(control, session_id, code):
    return (await control.executions.execute(ME, Execute(command=code, session_id=session_id))).outcome.stdout


async def test_sandboxes_that_were_left_go_on_with_their_state_and_their_lifetime(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with served(node, store) as control:
            ids = [(await control.sessions.create(ME, CreateSession())).id for _ in range(10)]
            for number, session_id in enumerate(ids):
                await run(control, session_id, f"x = {number}")
            await control.leave()
            with pytest.raises(HostNotReady):
                await control.sessions.create(ME, CreateSession())
        assert len(node.places) == 10
        async with served(node, store) as control:
            assert [await run(control, session_id, "print(x)") for session_id in ids] == [f"{n}\n" for n in range(10)]
            session = await control.sessions.get(ME, ids[0])
            assert 0 < session.vm.remaining_s() <= 300
            assert session.usage().execution_count == 2
            assert len(control.sessions.with_sandbox(ME, {}, 100)) == 10
            assert (await control.sessions.of_vm(ME, session.vm.id))[1].state is State.ACTIVE
        assert not node.places


async def test_what_does_not_live_is_lost_and_what_is_in_no_record_is_ended(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with served(node, store) as control:
            session_id = (await control.sessions.create(ME, CreateSession())).id
            await run(control, session_id, "1")
            await control.leave()
        await node.stop(next(iter(node.places)))
        await node.start(SandboxSpec("vm-nobodys", 1, 256))
        async with served(node, store) as control:
            session = await control.sessions.get(ME, session_id)
            assert (session.latest().state, session.latest().why) == (State.ENDED, EndReason.NODE_LOST)
            assert not node.places
            assert await run(control, session_id, "print('anew')") == "anew\n"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"expires_at": datetime.now(UTC) - timedelta(seconds=1)}, EndReason.LIFETIME),
        ({"state": State.ENDING, "why": EndReason.KILLED}, EndReason.KILLED),
    ],
)
async def test_what_should_have_ended_meanwhile_is_ended(tmp_path, values, why):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        session_id = await left(node, store, **values)
        async with served(node, store) as control:
            assert not node.places
            assert (await control.sessions.get(ME, session_id)).latest().why is why


async def test_a_lifetime_made_shorter_than_it_has_lived_ends_it(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        session_id = await left(node, store, started_at=datetime.now(UTC) - timedelta(seconds=100))
        async with served(node, store) as control:
            session = await control.sessions.get(ME, session_id)
            vm = session.vm
            await control.sessions.change(ME, session, None, {}, 200)
            assert 90 < vm.remaining_s() <= 100
            await control.sessions.change(ME, session, None, {}, 20)
            with anyio.fail_after(10):
                await vm.gone.wait()
            assert vm.lifecycle.why is EndReason.LIFETIME
        assert not node.places


async def test_a_sandbox_that_came_up_while_the_server_died_is_adopted(tmp_path):
    """The record still says `creating`; the node knows better."""
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        session_id = await left(node, store, state=State.CREATING, started_at=None, expires_at=None, start=None)
        async with served(node, store) as control:
            assert await run(control, session_id, "print(x)") == "1\n"


async def test_a_task_whose_end_nobody_heard_says_so(tmp_path):
    async with open_local_node() as node, open_store(tmp_path / "db") as store:
        async with served(node, store) as control:
            session = await control.sessions.create(ME, CreateSession())
            ask = ExecuteAsync(command="echo > begun; sleep 600", language="bash", session_id=session.id)
            task = await control.tasks.begin(ME, ask)
            until = "import os\nwhile not os.path.exists('begun'): pass"
            await run(control, session.id, until)
            await control.leave()
        await node.stop(next(iter(node.places)))
        async with served(node, store) as control:
            found = await control.tasks.get(ME, task.id)
            assert (found.status, found.reason) == ("killed", "node_lost")
            assert "not known" in found.stderr
