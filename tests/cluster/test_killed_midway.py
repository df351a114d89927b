"""`kill -9` in the midst of a create, at each step of it: nothing leaks, and the same request sent again makes one VM."""

import signal
import sys
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
