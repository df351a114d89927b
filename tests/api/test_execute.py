"""Running code through the whole road: SDK, HTTP, API, control, node."""

import threading

import anyio
import pytest

from instavm import AsyncInstaVM, InstaVM, OutcomeUnknown, SessionEnded
from instavm.wire.executions import Execution as WireExecution


def test_code_runs_and_its_output_comes_back(vm):
    result = vm.execute("print(6 * 7)")
    assert (result.stdout, result.stderr, result.exit_code) == ("42\n", "", 0)
    assert result["stdout"] == "42\n"
    assert str(result) == "42\n"
    assert set(result) == set(WireExecution.model_fields)


def test_variables_live_on_between_two_executions(vm):
    vm.execute("x = 42")
    assert vm.execute("print(x)").stdout == "42\n"


def test_code_that_fails_is_a_result(vm):
    result = vm.execute("raise ValueError('no')")
    assert result.exit_code == 1
    assert "ValueError: no" in result.stderr
    assert vm.execute("exit 7", language="bash").exit_code == 7


def test_the_environment_is_there_and_its_values_are_told_to_nobody(server):
    with server.client(env={"TOKEN": "s3cret", "N": 5, "ON": True}) as vm:
        assert vm.execute("import os; print(os.environ['TOKEN'])").stdout == "s3cret\n"
        assert vm.execute("echo $N $ON", language="bash").stdout == "5 true\n"
        info = vm.get_session_info()
    assert info.env_keys == ["N", "ON", "TOKEN"]
    assert "s3cret" not in str(dict(info))


def test_running_out_of_time_is_a_result_and_the_session_lives_on(vm):
    result = vm.execute("sleep 30", language="bash", timeout=1)
    assert (result.timed_out, result.exit_code, result.reason) == (True, 124, "timeout")
    assert vm.execute("print('ok')").stdout == "ok\n"


def test_the_first_result_tells_how_the_sandbox_came_up(vm):
    assert vm.execute("1").timing["driver"] == "local"
    assert vm.execute("1").timing is None
    assert vm.get_session_info().start["steps_ms"].keys() == {"spawn"}


def test_execute_without_a_session_makes_one(server, http):
    answer = http.post("/execute", json={"code": "print(1)"}).json()
    assert answer["stdout"] == "1\n"
    again = http.post("/execute", json={"command": "print(2)", "session_id": answer["session_id"]}).json()
    assert again["vm_id"] == answer["vm_id"]
    http.post("/kill", json={"session_id": answer["session_id"]})


def test_code_wins_over_command(vm, http):
    ask = {"code": "print('code')", "command": "print('command')", "session_id": vm.session_id}
    assert http.post("/execute", json=ask).json()["stdout"] == "code\n"


def test_two_slashes_are_one(server, vm, http):
    ask = {"command": "print(1)", "session_id": vm.session_id}
    assert http.post(f"{server.url}//execute", json=ask).json()["stdout"] == "1\n"


def test_many_executions_at_once_share_one_sandbox_and_none_is_lost(server):
    """They come while it boots; Python runs one after another."""
    with server.client(auto_start_session=False) as vm:
        vm.start_session()
        results = in_threads(8, lambda n: vm.execute(f"print({n})"))
        assert sorted(result.stdout for result in results) == [f"{n}\n" for n in range(8)]
        assert len({result.vm_id for result in results}) == 1
        assert sum(result.timing is not None for result in results) == 1
        assert vm.get_usage().execution_count == 8


def test_shell_commands_run_beside_python(vm):
    """The shell command ends what the Python code waits for: in a queue both would hang."""
    vm.execute("import os, time; os.mkfifo('pipe')")
    both = in_threads(
        2,
        lambda n: vm.execute("print(open('pipe').read())") if n else vm.execute("echo go > pipe", language="bash"),
    )
    assert sorted(result.stdout for result in both) == ["", "go\n\n"]


def test_a_sandbox_lost_under_running_code_is_an_unknown_outcome(server, vm):
    vm.execute("import os")
    failures = []

    def run():
        try:
            vm.execute("open('started', 'w').close(); import time; time.sleep(600)")
        except OutcomeUnknown as exc:
            failures.append(str(exc))

    thread = threading.Thread(target=run)
    thread.start()
    vm_id = vm.get_session_status().vm_id
    vm.execute("until [ -e started ]; do sleep 0.01; done", language="bash")
    server.portal.call(server.node.crash, vm_id)
    thread.join()
    assert vm_id in failures[0]
    assert "crashed" in failures[0]
    assert (vm.get_session_info().status, vm.get_session_info().reason) == ("failed", "crashed")
    assert vm.execute("print('anew')").vm_id != vm_id


def test_killing_a_session_ends_the_code_that_runs_there(server):
    vm = server.client()
    ended = []

    def run():
        try:
            vm.execute("open('started', 'w').close(); import time; time.sleep(600)")
        except SessionEnded as exc:
            ended.append(exc)

    vm.execute("1")
    thread = threading.Thread(target=run)
    thread.start()
    vm.execute("until [ -e started ]; do sleep 0.01; done", language="bash")
    vm.kill()
    thread.join()
    assert len(ended) == 1
    vm.close()


@pytest.mark.anyio
async def test_the_async_client_does_the_same(server):
    async with AsyncInstaVM(server.key, server.url, cpu_count=1) as vm:
        await vm.execute("x = 42")
        assert (await vm.execute("print(x)")).stdout == "42\n"
        assert (await vm.get_session_status()).vm_alive
        assert (await vm.get_session_info()).vcpu_count == 1
        assert (await vm.get_usage()).execution_count == 2
        assert await vm.is_session_active()
        assert [one.session_id for one in await vm.list_sandboxes()] == [vm.session_id]
        assert (await vm.get_current_user()).id == "local"
        session = vm.session_id
    assert vm.session_id is None
    with server.client(auto_start_session=False) as other:
        assert not other.is_session_active(session)


@pytest.mark.anyio
async def test_many_async_sandboxes_at_once(server):
    outputs = []

    async def one(n):
        async with AsyncInstaVM(server.key, server.url) as vm:
            outputs.append((await vm.execute(f"print({n})")).stdout)

    async with anyio.create_task_group() as tasks:
        for n in range(5):
            tasks.start_soon(one, n)
    assert sorted(outputs) == [f"{n}\n" for n in range(5)]


@pytest.mark.anyio
async def test_being_cancelled_leaves_no_sandbox(server):
    """`nothing_left_behind` looks."""
    started = anyio.Event()

    async def run():
        async with AsyncInstaVM(server.key, server.url) as vm:
            await vm.execute("1")
            started.set()
            await vm.execute("import time; time.sleep(600)")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await started.wait()
        tasks.cancel_scope.cancel()


def test_the_key_and_the_address_come_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("INSTAVM_API_KEY", server.key)
    monkeypatch.setenv("INSTAVM_BASE_URL", server.url + "/")
    with InstaVM() as vm:
        assert vm.execute("print(1)").stdout == "1\n"


def in_threads(count, work):
    results = [None] * count

    def run(n):
        results[n] = work(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
