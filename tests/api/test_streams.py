"""Following an execution over HTTP: as it comes, again after a break, and stopped."""

import json

import anyio
import httpx
import pytest

from instavm import AsyncInstaVM, InvalidInput, NotFound, OutcomeUnknown, SessionEnded
from instavm.client.calls import executions
from instavm.client.streaming import follow
from instavm.control import streams

UNTIL_GO = "echo one; while [ ! -e go ]; do sleep 0.02; done; echo two; exit 3"


def go(server, vm):
    """Let the code of UNTIL_GO go on."""
    (server.node.places[vm.get_session_info().vm_id].folder / "app" / "go").touch()


def events(response):
    """(number, kind, data) of each event until the end."""
    found = {}
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if line and name:
            found[name] = value
        elif "event" in found:
            yield int(found["id"]), found["event"], json.loads(found["data"])
            found = {}


def test_output_is_told_while_the_code_runs_and_the_result_comes_last(server, vm):
    seen = []
    for event in vm.stream(UNTIL_GO, language="bash"):
        seen.append(event.type)
        if event.get("text") == "one\n":
            go(server, vm)
    assert seen == ["stdout", "stdout", "result"]
    assert (event.result.stdout, event.result.exit_code) == ("one\ntwo\n", 3)
    assert not event.result.truncated


@pytest.mark.anyio
async def test_the_async_client_follows_too(server):
    async with AsyncInstaVM(server.key, server.url) as vm:
        found = [event async for event in vm.stream("echo a; echo b >&2", "bash")]
    assert [event.type for event in found] == ["stdout", "stderr", "result"]
    assert (found[-1].result.stdout, found[-1].result.stderr) == ("a\n", "b\n")


@pytest.mark.parametrize("by_header", [True, False])
def test_a_reader_who_went_away_reads_on_where_it_was(server, vm, http, by_header):
    """Nothing is lost and nothing comes twice, and the exit code is there."""
    ask = {"command": UNTIL_GO, "language": "bash", "session_id": vm.session_id}
    with http.stream("POST", "/execute/stream", json=ask) as response:
        execution = response.headers["X-Execution-Id"]
        number, kind, data = next(events(response))
    assert (number, kind, data) == (1, "stdout", {"text": "one\n"})
    go(server, vm)
    how = {"headers": {"Last-Event-ID": "1"}} if by_header else {"params": {"after": 1}}
    with http.stream("GET", f"/v1/executions/{execution}/stream", **how) as response:
        rest = list(events(response))
    assert [(number, kind) for number, kind, _ in rest] == [(2, "stdout"), (3, "result")]
    assert rest[-1][2]["exit_code"] == 3
    with http.stream("GET", f"/v1/executions/{execution}/stream") as response:
        assert [number for number, *_ in events(response)] == [1, 2, 3]


def test_it_can_be_cancelled_and_says_so(vm):
    for event in vm.stream("echo one; sleep 1000", language="bash"):
        if event.type == "stdout":
            assert vm.cancel(event.execution_id)
    assert (event.result.reason, event.result.exit_code, event.result.stdout) == ("cancelled", 130, "one\n")
    assert not vm.cancel(event.execution_id)
    assert "cancelled" in vm.explain(event.result)


def test_what_an_execution_told_is_kept_for_a_quarter_of_an_hour(server, vm, http):
    """A client that lost its connection and comes back after five minutes has missed nothing."""
    ask = {"command": UNTIL_GO, "language": "bash", "session_id": vm.session_id}
    with http.stream("POST", "/execute/stream", json=ask) as response:
        execution = response.headers["X-Execution-Id"]
        next(events(response))
    go(server, vm)
    followed = server.control.streams._known[execution]
    server.portal.call(followed.after, 2)

    def later(seconds):
        """As if so long had gone by; what is old is forgotten when something new begins."""
        followed.ended_at -= seconds
        list(vm.stream("true", language="bash"))
        with http.stream("GET", f"/v1/executions/{execution}/stream?after=1") as response:
            return response.status_code, [data for _, _, data in events(response)]

    status, (text, result) = later(300)
    assert (status, text["text"], result["exit_code"]) == (200, "two\n", 3)
    assert later(streams.KEPT_S - 310)[0] == 200
    assert later(20)[0] == 404


def test_an_execution_that_the_server_has_forgotten_has_an_unknown_outcome(server, vm):
    """As after a restart: the reader is told that nobody knows, not that there never was such a thing."""
    following = vm.stream("echo one; sleep 1000", language="bash")
    execution = next(following).execution_id
    server.control.streams._known.pop(execution)
    reader = following.gi_frame.f_locals["reader"]
    reader._event = {}
    with pytest.raises(OutcomeUnknown, match="may or may not have finished"):
        list(follow(vm._link, reader))
    following.close()


def test_an_execution_of_somebody_else_does_not_exist(server, vm):
    (*_, last) = vm.stream("echo mine", language="bash")
    with server.client(auto_start_session=False) as mine:
        mine.cancel(last.execution_id)
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.other_key}) as other:
        assert other.get(f"/v1/executions/{last.execution_id}/stream").status_code == 404
        assert other.post(f"/v1/executions/{last.execution_id}/cancel").status_code == 404


def test_what_is_refused_is_refused_before_anything_runs(vm):
    with pytest.raises(InvalidInput):
        next(vm.stream("x", language="cobol"))
    with pytest.raises(NotFound):
        vm.cancel("exe_nothing")


def killing(server, vm, after_s=0.0):
    """Kill the session as soon as its code has been running for so long."""

    async def kill():
        session = server.control.sessions._known[vm.session_id]
        while not session.vm.running:
            await anyio.sleep(0.01)
        await anyio.sleep(after_s)
        await server.control.sessions.kill(session)

    return server.portal.start_task_soon(kill)


def test_an_error_ends_the_stream_as_the_error_it_is(server):
    with server.client() as vm:
        killed = killing(server, vm)
        with pytest.raises(SessionEnded):
            list(vm.stream("import time; time.sleep(1000)"))
        killed.result()


@pytest.mark.parametrize("patience_s", [1, 2])
def test_a_client_that_waits_no_longer_than_the_code_may_run_gets_the_result(server, vm, patience_s):
    """The hosted service's client uses one number for both."""
    ask = {"command": "sleep 1000", "language": "bash", "session_id": vm.session_id, "timeout": patience_s}
    with httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}, timeout=patience_s) as client:
        answer = client.post("/execute", json=ask)
    assert answer.status_code == 200
    assert (answer.json()["exit_code"], answer.json()["timed_out"]) == (124, True)


def test_an_error_after_the_answer_has_begun_is_a_result_that_says_so(server):
    """The status is out by then. Our client makes the error of it that it is; others read what they know."""
    ask = {"command": "import time; time.sleep(1000)", "timeout": 4}
    with server.client() as vm, httpx.Client(base_url=server.url, headers={"X-API-Key": server.key}) as http:
        killed = killing(server, vm, after_s=2.6)
        answer = http.post("/execute", json={**ask, "session_id": vm.session_id}, timeout=60)
        killed.result()
    assert answer.status_code == 200
    told = answer.json()
    assert (told["reason"], told["exit_code"], told["code"]) == ("vm_lost", None, "session_ended")
    assert "was killed" in told["stderr"]
    call = executions.execute(vm.session_id, "x", "python", None)
    with pytest.raises(SessionEnded):
        call.read(answer.content)
