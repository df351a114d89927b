"""Processes through everything: SDK, command line and HTTP, on a server that is killed meanwhile."""

import json
import signal

import httpx
import pytest

from instavm import (
    AsyncInstaVM,
    InvalidInput,
    ProcessEnded,
    ProcessError,
    ProcessNotFound,
    SessionEnded,
    SessionNotFound,
)
from instavm.cli.app import run


@pytest.fixture(scope="module")
def vm(module_servers):
    with module_servers.client() as vm:
        yield vm


@pytest.fixture
def http(module_servers, vm):
    base = f"http://127.0.0.1:{module_servers.port}/v1/sessions/{vm.session_id}"
    with httpx.Client(base_url=base, headers={"X-API-Key": module_servers.key}, timeout=90) as http:
        yield http


def test_a_conversation_with_a_process(vm):
    process = vm.processes.start("while read line; do echo got $line; done; echo bye >&2; exit 4")
    process.write("one\n")
    events = process.follow()
    assert next(events).text == "got one\n"
    process.write(b"two\n", close=True)
    kinds = [event.type for event in events]
    assert kinds[-1] == "exit" and set(kinds) == {"stdout", "stderr", "exit"}
    assert (process.result.exit_code, process.result.status) == (4, "exited")
    told = process.output()
    assert (told.stdout, told.stderr, told.lost) == ("got one\ngot two\n", "bye\n", 0)
    assert str(told) == "got one\ngot two\nbye\n"
    assert process.id in [one.process_id for one in vm.processes.list()]


def test_reads_go_on_where_the_last_one_ended(vm):
    process = vm.processes.start(["bash", "-c", "echo one; read x; echo two"])
    while not (first := process.read()).text:
        continue
    process.write("\n")
    assert process.wait(60).exit_code == 0
    assert (first.text, process.read().text, process.read().text, process.read(since=0).text) == (
        "one\n",
        "two\n",
        "",
        "one\ntwo\n",
    )


def test_waiting_has_an_end_and_a_kill_comes_through(vm):
    process = vm.processes.start(["sleep", "1000"], env={"A": 1}, cwd="/tmp")
    assert process.result is None and "running" in repr(process)
    with pytest.raises(TimeoutError, match="runs on"):
        process.wait(0.2)
    again = vm.processes.get(process.id)
    again.kill()
    assert (process.wait().exit_code, process.result.signal) == (137, 9)
    again.kill()
    with pytest.raises(ProcessEnded):
        process.signal("TERM")
    with pytest.raises(ProcessError):
        process.write("x")


def test_bad_input_is_refused_here_and_there_in_the_same_words(vm, http):
    process = vm.processes.start("sleep 1000")
    known = "one of HUP, INT, QUIT, .*KILL.*TERM"
    for wrong in ("NOPE", 999, True):
        with pytest.raises(InvalidInput, match=known):
            process.signal(wrong)
        answer = http.post(f"/processes/{process.id}/signal", json={"signal": wrong})
        assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "invalid_input", "signal")
    for wrong in ("", " ", [], ["a", 1], ["a\0"], "x" * 70_000, {}, None):
        assert http.post("/processes", json={"command": wrong}).status_code == 422, wrong
    for more in ({"cwd": ""}, {"shell": "zsh"}, {"env": {"1": "x"}}, {"env": []}):
        assert http.post("/processes", json={"command": "true", **more}).status_code == 422, more
    for body in ({"data": "*", "encoding": "base64"}, {"data": "x" * ((1 << 20) + 1)}, {"encoding": "hex"}):
        answer = http.post(f"/processes/{process.id}/stdin", json=body)
        assert answer.status_code == 422 and "xxxx" not in answer.text, body
    for wrong in (-1, 61, "1", True):
        assert http.post(f"/processes/{process.id}/wait", json={"timeout": wrong}).status_code == 422, wrong
    for params in ({"after": -1}, {"after": 10**6}, {"size": 1}, {"after": "x"}):
        assert http.get(f"/processes/{process.id}", params=params).status_code == 422, params
    assert http.get(f"/processes/{process.id}/stream", params={"after": 10**6}).status_code == 422
    process.kill()


def test_what_is_not_there_is_not_found(module_servers, vm, http):
    for answer in (
        http.get("/processes/prc_no"),
        http.get("/processes/prc_no/stream"),
        http.post("/processes/prc_no/wait", json={}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "process_not_found")
    with pytest.raises(ProcessNotFound):
        vm.processes.get("prc_no")
    with module_servers.client(auto_start_session=False) as other:
        other.session_id = "0b7f3a52-0000-4000-8000-000000000000"
        with pytest.raises(SessionNotFound):
            other.processes.list()
        other.session_id = None


def test_a_killed_session_has_no_processes(module_servers):
    with module_servers.client() as vm:
        process = vm.processes.start("sleep 1000")
        vm.kill()
        for wanted in (process.refresh, process.output, lambda: list(process.follow())):
            with pytest.raises(SessionEnded):
                wanted()


def test_characters_come_whole_however_they_were_written(vm):
    slow = "printf '\\xe2'; sleep 0.3; printf '\\x82\\xac'; printf '\\xff'; yes '€ä😀' | head -c 300000"
    process = vm.processes.start(slow)
    text = "".join(event.text for event in process.follow() if event.type == "stdout")
    assert text.startswith("€\ufffd€ä😀\n€ä😀\n") and text.count("\ufffd") <= 2
    assert process.output().text == text


def test_a_stream_is_taken_up_by_its_position(vm, http):
    process = vm.processes.start("echo one; read x; echo two; exit 3")
    process.read(since=0)
    with http.stream("GET", f"/processes/{process.id}/stream") as response:
        first = next(line for line in response.iter_lines() if line.startswith("id: "))
    process.write("\n")
    assert first == "id: 4"
    with http.stream("GET", f"/processes/{process.id}/stream", headers={"Last-Event-ID": "4"}) as response:
        rest = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert rest[0:2] == ["id: 8", "event: stdout"] and rest[4] == "event: exit"
    assert json.loads(rest[5].removeprefix("data: "))["exit_code"] == 3


def test_a_start_that_is_repeated_starts_once(vm, http):
    ask, key = {"command": "sleep 1000"}, {"Idempotency-Key": "once"}
    one, two = (http.post("/processes", json=ask, headers=key).json() for _ in range(2))
    assert one == two
    assert http.post(f"/processes/{one['process_id']}/signal", json={"signal": "SIGKILL"}).status_code == 200


@pytest.mark.anyio
async def test_the_async_client_does_the_same(module_servers):
    async with AsyncInstaVM(module_servers.key, f"http://127.0.0.1:{module_servers.port}") as vm:
        process = await vm.processes.start("cat; exit 2")
        await process.write("hello", close=True)
        told = [event async for event in process.follow()]
        assert ("".join(event.text for event in told[:-1]), told[-1].process.exit_code) == ("hello", 2)
        assert (await process.output()).stdout == "hello" == (await process.read(0)).text
        other = await vm.processes.start("sleep 1000")
        with pytest.raises(TimeoutError):
            await other.wait(0.1)
        await other.signal(15)
        assert (await other.wait()).signal == 15
        assert (await other.refresh()).exit_code == 143
        assert [one.process_id for one in await vm.processes.list()] == [process.id, other.id]
        await (await vm.processes.get(other.id)).kill()


def test_the_command_line(module_servers, vm, capsys, monkeypatch):
    monkeypatch.setenv("INSTAVM_API_KEY", module_servers.key)
    monkeypatch.setenv("INSTAVM_BASE_URL", f"http://127.0.0.1:{module_servers.port}")
    assert run(["run", vm.session_id, "echo $A; echo err >&2; exit 6", "-e", "A=b"]) == 6
    assert capsys.readouterr() == ("b\n", "err\n")
    assert run(["run", "-d", vm.session_id, "--", "bash", "-c", "echo up; sleep 1000"]) == 0
    process = capsys.readouterr().out.strip()
    assert run(["ps", vm.session_id, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["status"] for one in listed if one["process_id"] == process] == ["running"]
    assert next(iter(vm.processes.get(process).follow())).text == "up\n"
    assert run(["kill", vm.session_id, process, "--signal", "term"]) == 0
    assert run(["logs", "-f", vm.session_id, process]) == 0
    assert capsys.readouterr().out == "up\n"
    assert run(["logs", vm.session_id, process, "--since", "3"]) == 0
    assert run(["ps", vm.session_id]) == 0
    assert process in capsys.readouterr().out
    assert run(["kill", vm.session_id, "prc_no"]) == 1
    assert capsys.readouterr().err.startswith("Error: ")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_processes_outlive_their_server(servers, signum):
    """One that is followed over the change, with nothing lost and nothing twice; its stdin and its end are still there."""
    servers.start(ON_SHUTDOWN="leave")
    vm = servers.client()
    process = vm.processes.start("for i in 1 2 3; do echo $i; read x; done; exit 9")
    told = process.follow()
    assert next(told).text == "1\n"
    servers.end(signum)
    servers.start(ON_SHUTDOWN="stop")
    for expected in ("2\n", "3\n"):
        process.write("\n")
        assert next(told).text == expected
    process.write("\n")
    assert next(told).process.exit_code == 9
    assert vm.processes.get(process.id).output().stdout == "1\n2\n3\n"
    vm.kill()
