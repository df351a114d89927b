"""`kill -9` in the midst of a create, at each step of it: nothing leaks, and the same request sent again makes one VM."""

import signal
import sqlite3
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from servers import NOTHING

from instavm.node import inventory

MORTAL = Path(__file__).with_name("mortal_server.py")
POINTS = [
    "before instavm.control.store.sessions:SessionRows.add",
    "after instavm.control.store.journal:_execute",
    "after instavm.node.machines:make_home",
    "after instavm.node.vmm.process:VMMProcess.spawn",
    "after instavm.node.vmm.qemu:QemuMachine.load",
    "after instavm.node.agent:Agent.identify",
    "after instavm.node.machines:Prepared.record",
    "before instavm.control.store.repeats:RepeatRows.answered",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(servers, point):
    when, where = point.split()
    ask = {"json": {"memory_mb": 512, "metadata": {"of": "midway"}}, "params": {"wait": "true"}, "timeout": 120}
    url = f"http://127.0.0.1:{servers.port}/v1/vms"
    headers = {"X-API-Key": servers.key, "Idempotency-Key": "midway"}
    servers.start(sys.executable, str(MORTAL), where, when, SPARE_MACHINES=0)
    with pytest.raises(httpx.TransportError):
        httpx.post(url, headers=headers, **ask)
    status = servers.process.wait(60)
    assert status == -signal.SIGKILL if "instavm.node" in where else status > 0

    servers.start(SPARE_MACHINES=0)
    left = inventory.take(servers.state)
    assert len(left.processes) == len(left.homes) <= 1, "what belongs to nobody was removed"
    made = [httpx.post(url, headers=headers, **ask).json() for _ in range(2)]
    assert made[0] == made[1]
    (vm,) = httpx.get(url, headers=headers).json()
    assert (vm["vm_id"], vm["status"]) == (made[0]["vm_id"], "active")
    client = servers.client(auto_start_session=False)
    client.session_id = made[0]["session_id"]
    assert client.execute("print(6 * 7)").stdout == "42\n"
    assert len(inventory.take(servers.state).processes) == 1
    client.kill()
    assert inventory.take(servers.state) == NOTHING


@pytest.mark.parametrize(
    "point",
    [
        "before instavm.control.sessions:Sessions.ready",
        "before instavm.control.executions:Executions.run",
        "before instavm.node.agent:Agent.execute",
        "after instavm.node.agent:Agent.execute",
    ],
)
def test_a_task_is_never_lost_and_runs_once(servers, point):
    """Answered or not: once it is recorded it runs, whichever server does it, and what it wrote is told."""
    when, where = point.split()
    url, headers = f"http://127.0.0.1:{servers.port}", {"X-API-Key": servers.key}
    servers.start()
    with servers.client() as client:
        client.execute("1")  # so that the next server finds the template
    servers.end()
    servers.start(sys.executable, str(MORTAL), where, when, SPARE_MACHINES=0)
    ask = {"command": "echo ran >> /app/ran; cat /app/ran", "language": "bash"}
    with suppress(httpx.TransportError):
        httpx.post(f"{url}/execute_async", json=ask, headers=headers, timeout=60)
    assert servers.process.wait(60) != 0
    servers.start()
    deadline = time.monotonic() + 120
    while True:
        (task,) = httpx.get(f"{url}/v1/executions/", headers=headers).json()
        if task["is_complete"]:
            break
        assert time.monotonic() < deadline, task
        time.sleep(0.1)
    assert (task["status"], task["stdout"]) == ("completed", "ran\n")
    client = servers.client(auto_start_session=False)
    client.session_id = task["session_id"]
    assert client.execute("cat /app/ran", language="bash").stdout == "ran\n"
    client.kill()
    with closing(sqlite3.connect(servers.state / "control" / "control.db")) as database:
        assert database.execute("SELECT command FROM tasks").fetchall() == [(None,)], "it is kept no longer than needed"
