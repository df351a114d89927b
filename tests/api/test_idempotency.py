"""Idempotency-Key: one VM and one answer, whatever happens between, the end of the server included."""

import threading
import uuid

import anyio
import pytest
from local_node import open_local_node

from instavm.control.accounts import LocalAccounts
from instavm.control.control import open_control
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import open_store
from instavm.errors import Conflict, OutcomeUnknown
from instavm.wire.sessions import CreateSession

ME = Tenant("local", "me", None)


def headers():
    return {"Idempotency-Key": uuid.uuid4().hex}


@pytest.mark.parametrize("path", ["/v1/sessions/session", "/v1/vms"])
def test_a_create_that_is_repeated_makes_one_vm_and_gives_one_answer(server, http, path):
    key, answers = headers(), []
    threads = [
        threading.Thread(target=lambda: answers.append(http.post(path, json={"memory_mb": 300}, headers=key)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.append(http.post(path, json={"memory_mb": 300}, headers=key))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(http.get("/v1/vms").json()) == 1
    http.post("/kill", json={"session_id": answers[0].json()["session_id"]})


def test_code_with_a_key_runs_once(vm, http):
    key = headers()
    ask = {"command": "n = globals().get('n', 0) + 1; print(n)", "session_id": vm.session_id}
    answers = [http.post("/execute", json=ask, headers=key) for _ in range(3)]
    assert {answer.text for answer in answers} == {answers[0].text}
    assert answers[0].json()["stdout"] == "1\n"
    task, again = (http.post("/execute_async", json=ask, headers=headers() | key2).json() for key2 in [headers()] * 2)
    assert task == again


def test_a_stream_with_a_key_is_one_execution_read_twice(vm, http):
    key = headers()
    ask = {"command": "n = globals().get('n', 0) + 1; print(n)", "session_id": vm.session_id}
    first, again = (http.post("/execute/stream", json=ask, headers=key) for _ in range(2))
    assert first.headers["X-Execution-Id"] == again.headers["X-Execution-Id"]
    assert first.text == again.text and 'data: {"text":"1\\n"}' in first.text
    assert http.post("/execute/stream", json={**ask, "command": "0"}, headers=key).status_code == 409
    assert http.post("/execute/stream", json=ask).text != first.text


def test_a_key_is_good_for_one_request_and_one_account(server, vm, http):
    key = headers()
    ask = {"command": "print(1)", "session_id": vm.session_id}
    http.post("/execute", json=ask, headers=key)
    other = http.post("/execute", json={**ask, "command": "print(2)"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    assert http.post("/execute", json=ask, headers=key | {"X-API-Key": server.other_key}).status_code == 404
    for wrong in ("", "x" * 256, "a\tb"):
        assert http.post("/execute", json=ask, headers={"Idempotency-Key": wrong}).status_code == 400


def test_what_was_refused_may_be_tried_again(vm, http):
    from local_node import NODE_FULL_MIB

    key = headers()
    for _ in range(2):
        answer = http.post("/v1/vms", json={"memory_mb": NODE_FULL_MIB}, headers=key)
        assert answer.status_code == 429
    assert http.get("/v1/vms").json() == [] or len(http.get("/v1/vms").json()) == 1


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits: nothing after it runs."""


POINTS = ["repeat recorded", "session recorded", "vm recorded", "vm started", "answered"]


@pytest.mark.anyio
@pytest.mark.parametrize("point", POINTS)
async def test_a_server_killed_in_the_midst_of_a_create(tmp_path, point):
    """The next server, on what the first had written by then, gives the retry exactly one VM, and nothing is left over."""
    async with open_local_node() as node:
        await first_life(tmp_path, node, point)
        async with (
            open_store(tmp_path / "killed") as store,
            open_control(node, store, LocalAccounts(store.accounts)) as control,
        ):
            answers = [await create(control) for _ in range(2)]
            assert answers[0] == answers[1]
            session = await control.sessions.get(ME, answers[0].decode())
            await control.sessions.ready(session)
            assert len(node.places) == len(control.vms) == 1
            with pytest.raises(Conflict):
                await control.repeats.once(ME, "key", "another print", work(control), again=True)
        assert not node.places


async def first_life(tmp_path, node, point):
    """A server whose database is copied at `point`, as a kill would leave it; its sandboxes live on if they had begun."""
    import sqlite3

    async with (
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):

        def snapshot():
            with sqlite3.connect(tmp_path / "db") as source, sqlite3.connect(tmp_path / "killed") as target:
                source.backup(target)

        async def made(target):
            if point == "repeat recorded":
                snapshot()
            session = await control.sessions.create(ME, CreateSession(), target)
            if point in ("session recorded", "vm recorded"):
                snapshot()
            await control.sessions.ready(session)
            if point == "vm started":
                await store.journal.written()
                snapshot()
            return session.id.encode()

        await control.repeats.once(ME, "key", "print", made, again=True)
        if point == "answered":
            snapshot()
        await control.leave()
    if point in ("repeat recorded", "session recorded"):
        for vm_id in list(node.places):
            await node.stop(vm_id)


def work(control):
    async def made(target):
        return (await control.sessions.create(ME, CreateSession(), target)).id.encode()

    return made


async def create(control):
    return await control.repeats.once(ME, "key", "print", work(control), again=True)


@pytest.mark.anyio
async def test_code_that_was_broken_off_is_not_run_again(tmp_path):
    async with (
        open_local_node() as node,
        open_store(tmp_path / "db") as store,
        open_control(node, store, LocalAccounts(store.accounts)) as control,
    ):
        ran = []

        async def broken(_target):
            ran.append(1)
            raise RuntimeError("the server ended here")

        with pytest.raises(RuntimeError):
            await control.repeats.once(ME, "key", "print", broken, again=False)
        with pytest.raises(OutcomeUnknown, match="may or may not"):
            await control.repeats.once(ME, "key", "print", broken, again=False)
        assert ran == [1]
        await anyio.lowlevel.checkpoint()
