"""A server that dies, or is upgraded, while sandboxes run: nobody loses anything."""

import json
import signal
import time

import httpx
import psutil
import pytest
from servers import NOTHING

from instavm.node import inventory
from instavm_guest.frames import PROTOCOL


def test_killed_with_ten_sandboxes_that_hold_state(servers):
    """kill -9, start again: all ten answer with what they held, and nothing else is there."""
    servers.start()
    clients = [servers.client() for _ in range(10)]
    for number, client in enumerate(clients):
        client.execute(f"x = {number}")
    servers.end(signal.SIGKILL)
    servers.start()
    assert [client.execute("print(x)").stdout for client in clients] == [f"{number}\n" for number in range(10)]
    for client in clients:
        assert client.is_session_active()
        client.kill()


def test_a_sandbox_that_died_with_the_server_is_told_from_one_that_lives(servers):
    servers.start()
    dead, alive = servers.client(), servers.client()
    dead.execute("x = 1")
    alive.execute("x = 2")
    before = inventory.running(servers.state / "machines")
    record = {name: (servers.state / "machines" / name / "sandbox.json") for name in before}
    lost = dead.get_session_status()["vm_id"]
    servers.end(signal.SIGKILL)
    (machine,) = [pid for name, pid in before.items() if record[name].exists() and lost in record[name].read_text()]
    psutil.Process(machine).kill()
    servers.start()
    assert alive.execute("print(x)").stdout == "2\n"
    status = dead.get_session_status()
    assert not status["vm_alive"] and status["expires_in_seconds"] == 0
    assert "NameError" in dead.execute("print(x)").stderr, "a new sandbox has nothing of the old state"


def test_a_sandbox_with_an_agent_of_another_version_is_ended(servers):
    """What cannot be talked to is not kept: its user hears that it is gone, and gets a new one."""
    servers.start()
    client = servers.client()
    client.execute("x = 1")
    servers.end(signal.SIGKILL)
    machines = servers.state / "machines"
    ((note, pid),) = [  # a spare machine has no note
        (machines / name / "sandbox.json", pid)
        for name, pid in inventory.running(machines).items()
        if (machines / name / "sandbox.json").exists()
    ]
    told = json.loads(note.read_text())
    assert told.pop("protocol") == PROTOCOL > 1
    note.write_text(json.dumps(told))
    servers.start()
    assert not client.get_session_status()["vm_alive"] and not psutil.pid_exists(pid)
    assert client.execute("print('anew')").stdout == "anew\n"


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_task_survives_the_server(servers, signum):
    """It goes on while nobody is there, and what it wrote, before and meanwhile, is told by the next server."""
    servers.start(ON_SHUTDOWN="leave")
    client = servers.client()
    client.execute("1")
    command = "echo before; touch begun; sleep 6; echo after; exit 3"
    ask = {"command": command, "session_id": client.session_id, "language": "bash"}
    url, headers = f"http://127.0.0.1:{servers.port}", {"X-API-Key": servers.key}
    task = httpx.post(f"{url}/execute_async", json=ask, headers=headers).json()["task_id"]
    client.execute("until [ -e begun ]; do sleep 0.1; done", language="bash")
    servers.end(signum)
    servers.start(ON_SHUTDOWN="stop")
    deadline = time.monotonic() + 120
    while not (told := httpx.get(f"{url}/v1/executions/{task}", headers=headers).json())["is_complete"]:
        assert time.monotonic() < deadline, told
        time.sleep(0.2)
    assert (told["serialized_stdout"], told["exit_code"], told["status"]) == ("before\nafter\n", 3, "failed")
    client.kill()


def test_an_upgrade_leaves_sandboxes_running_and_a_stop_ends_them(servers):
    """SIGTERM with INSTAVM_ON_SHUTDOWN=leave is how a server is replaced; the default ends what it runs."""
    servers.start(ON_SHUTDOWN="leave")
    client = servers.client()
    client.execute("x = 3")
    servers.end()
    assert len(inventory.take(servers.state).processes) == 1
    servers.start(ON_SHUTDOWN="stop")
    assert client.execute("print(x)").stdout == "3\n"
    servers.end()
    assert inventory.take(servers.state) == NOTHING
    servers.start()


def test_a_key_that_is_killed_while_down_stays_killed(servers):
    """A session that was killed is never respawned, by no server."""
    servers.start()
    client = servers.client()
    client.execute("1")
    session = client.session_id
    client.kill()
    servers.end(signal.SIGKILL)
    servers.start()
    again = servers.client(auto_start_session=False)
    again.session_id = session
    with pytest.raises(Exception, match="killed"):
        again.execute("print(1)")
