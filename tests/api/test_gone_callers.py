"""A caller that goes away: what was done for its answer alone is stopped, and what was promised goes on."""

import threading
import time

import httpx
import pytest
from test_streams import UNTIL_GO, events, go

from instavm.control.control import Control

GIVES_UP_S = 0.5


def until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gives_up(http, ask, **more):
    """Send it, and go away while it runs."""
    with pytest.raises(httpx.ReadTimeout):
        http.post("/execute", json=ask, timeout=GIVES_UP_S, **more)


@pytest.mark.parametrize("timeout", [None, 2, 600])
def test_its_code_is_stopped(server, vm, http, timeout):
    """Whatever silence the server takes it to bear, that is, before and after the answer has begun."""
    vm.execute("1")
    (place,) = server.node.places.values()
    with pytest.raises(httpx.HTTPError):
        ask = {"command": "sleep 1000", "language": "bash", "session_id": vm.session_id, "timeout": timeout}
        with http.stream("POST", "/execute", json=ask, timeout=GIVES_UP_S + (timeout == 2)) as answer:
            next(answer.iter_bytes())
            raise httpx.ReadTimeout("seen enough")
    until(lambda: not place.shells)
    assert vm.execute("print('next')").stdout == "next\n"


def test_code_that_waits_for_its_turn_never_runs(server, vm, http):
    """It waits behind other Python code of the session."""
    began = threading.Thread(
        target=vm.execute, args=("import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)",)
    )
    began.start()
    until(lambda: server.control.vms.get(vm.get_session_info().vm_id).running)
    gives_up(http, {"command": "open('ran', 'w')", "session_id": vm.session_id})
    go(server, vm)
    began.join()
    assert vm.execute("print(os.path.exists('ran'))").stdout == "False\n"


def test_a_session_made_for_it_alone_ends(server, http):
    """Only the answer would have told its id."""
    gives_up(http, {"command": "sleep 1000", "language": "bash"})
    until(lambda: not server.node.places)


def test_code_with_an_idempotency_key_goes_on_for_who_comes_back(server, vm, http):
    ask = {"command": UNTIL_GO, "language": "bash", "session_id": vm.session_id}
    headers = {"Idempotency-Key": "mine"}
    gives_up(http, ask, headers=headers)
    go(server, vm)
    assert http.post("/execute", json=ask, headers=headers).json()["stdout"] == "one\ntwo\n"


def test_a_streamed_execution_goes_on(server, vm, http):
    ask = {"command": UNTIL_GO, "language": "bash", "session_id": vm.session_id}
    with http.stream("POST", "/execute/stream", json=ask) as response:
        execution = response.headers["X-Execution-Id"]
        next(events(response))
    go(server, vm)
    with http.stream("GET", f"/v1/executions/{execution}/stream") as response:
        assert [kind for _, kind, _ in events(response)] == ["stdout", "stdout", "result"]


def test_a_task_goes_on(server, vm, http):
    task = vm.execute_async(UNTIL_GO, language="bash").task_id
    go(server, vm)
    assert vm.get_task_result(task, poll_interval=0.01).stdout == "one\ntwo\n"


def test_an_upload_that_is_broken_off_leaves_no_file(server, vm, http):
    vm.execute("1")
    (place,) = server.node.places.values()

    def body():
        head = 'Content-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
        for name, value in (("remote_path", "whole"), ("session_id", vm.session_id)):
            yield ("--b\r\n" + head.format(name, value)).encode()
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"x" * (1 << 20)
        until(lambda: (place.folder / "app" / "whole.part").exists())
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        http.post("/upload", content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    until(lambda: not server.control.files._bound._taken)
    assert [path.name for path in (place.folder / "app").iterdir()] == []


def test_a_download_that_is_broken_off_is_not_read_on(server, vm, http):
    vm.execute("open('big', 'wb').truncate(60 << 20)")
    ask = {"filename": "big", "session_id": vm.session_id}
    with http.stream("POST", "/download", json=ask) as response:
        next(response.iter_bytes())
        assert server.control.files._bound._taken
    until(lambda: not server.control.files._bound._taken)


def test_a_snapshot_that_is_waited_for_is_made_all_the_same(server, vm, http, monkeypatch):
    """What changes something is never broken off half-way."""
    vm_id = vm.execute("1").vm_id
    slow = threading.Event()
    prepare = server.node.prepare

    async def prepares(*args):
        while not slow.is_set():
            await __import__("anyio").sleep(0.01)
        await prepare(*args)

    monkeypatch.setattr(server.node, "prepare", prepares)
    with pytest.raises(httpx.ReadTimeout):
        http.post(f"/v1/vms/{vm_id}/snapshot", json={"name": "mine"}, timeout=GIVES_UP_S)
    slow.set()
    until(lambda: [one["status"] for one in http.get("/v1/snapshots").json()] == ["ready"])
    (made,) = http.get("/v1/snapshots").json()
    http.delete(f"/v1/snapshots/{made['snapshot_id']}")


def test_its_request_is_not_counted_any_more(server, vm, http):
    gives_up(http, {"command": "sleep 1000", "language": "bash", "session_id": vm.session_id})
    control: Control = server.control
    until(lambda: not control.requests._taken)
    until(lambda: not control.executions._bound._taken)
