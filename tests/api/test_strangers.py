"""What belongs to another tenant: not only the words of the answer but the work behind it is that for what does not exist."""

import pytest
from local_node import open_local_node
from sqlalchemy import event

from instavm.control.accounts import LocalAccounts
from instavm.control.control import open_control
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import open_store
from instavm.errors import NotFound, SessionNotFound
from instavm.wire.sessions import CreateSession
from instavm.wire.tasks import ExecuteAsync

OWNER, STRANGER = Tenant("local", "owner", None), Tenant("stranger", "stranger", None)


@pytest.mark.anyio
async def test_a_stranger_costs_the_same_statements_as_nobody(tmp_path):
    """A session that is in memory, its sandbox and its task, asked for by somebody else; then ids that nobody has."""
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        session = await control.sessions.create(OWNER, CreateSession())
        vm = await control.sessions.ready(session)
        task = await control.tasks.begin(OWNER, ExecuteAsync(command="1", session_id=session.id))
        asked = [
            (control.sessions.get, session.id, "00000000-0000-4000-8000-000000000000", SessionNotFound),
            (control.sessions.of_vm, vm.id, "vm-aaaaaaaaaa", NotFound),
            (control.tasks.get, task.id, "tsk_" + "0" * 24, NotFound),
        ]
        for ask, theirs, nobodys, refusal in asked:
            assert await ask(OWNER, theirs)
            work = []
            for name in (theirs, nobodys):
                await store.journal.written()
                with statements(store) as seen, pytest.raises(refusal):
                    await ask(STRANGER, name)
                work.append(seen)
            assert work[0] == work[1], ask
            assert work[0]


class statements:
    """What the database is asked while the block lasts; what is written meanwhile is somebody else's."""

    def __init__(self, store):
        self._engine = store.sessions._engine._engine

    def __enter__(self):
        self._seen = []
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self._seen

    def __exit__(self, *_):
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, _connection, _cursor, statement, *_):
        if statement.startswith("SELECT"):
            self._seen.append(statement)
