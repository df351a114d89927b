"""Sandboxes that were restored and warmed up ahead of a request: as good as any other, and never in the way."""

import os
import signal

import anyio
import probed
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec
from instavm.node import inventory, machines
from instavm.node.runtime import Runtime

pytestmark = pytest.mark.anyio
OWN = ("/etc/machine-id", "/proc/sys/kernel/random/boot_id", "/sys/class/net/eth0/address")
DRAW = (
    "import os, random, socket; print(os.urandom(8).hex(), random.random(), end=' ')\n"
    f"print(*[open(file).read().strip() for file in {OWN}], socket.gethostname(), sorted(dir()))"
)
ASK = Command(DRAW, "python", 60)
DRAWN = 2 + len(OWN)


@pytest.fixture
async def node(settings, short_folder):
    own = probed.at(settings, short_folder / "warm", spare_machines=0, warm_machines=2)
    async with Runtime.open(own) as node:
        yield node
    assert inventory.take(own.state_dir) == inventory.Inventory(frozenset(), frozenset())


async def until(condition):
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.02)


def warm(node):
    return [one for one in node._machines.prepared() if one.stage == "warm_machine"]


async def test_the_pool_follows_demand_and_its_sandboxes_are_like_all_others(node):
    """Asked for once, the next one is warm; two of them have nothing in common, and no trace of the warming up."""
    cold = await node.start(SandboxSpec("vm-a", 2, 512))
    assert "machine" in cold.steps_ms
    await until(lambda: len(warm(node)) == 2)
    told = []
    for name in ("vm-b", "vm-c"):
        started = await node.start(SandboxSpec(name, 2, 512, env={"NAME": name}))
        assert "warm_machine" in started.steps_ms
        told.append((await node.execute(name, ASK)).stdout.split(maxsplit=DRAWN + 1))
        assert (await node.execute(name, Command("echo $NAME", "bash", 60))).stdout == f"{name}\n"
    assert all(one != other for one, other in zip(*[one[:DRAWN] for one in told], strict=True))
    assert [one[DRAWN] for one in told] == ["vm-b", "vm-c"]
    counted = await node.metrics()
    assert (counted.running, counted.starts) == (3, {"machine": 1, "warm_machine": 2})
    assert counted.start_seconds["warm_machine"] < counted.start_seconds["machine"]
    plain = (await node.execute("vm-a", ASK)).stdout.split(maxsplit=DRAWN + 1)
    assert told[0][-1] == told[1][-1] == plain[-1], "the warming up left something behind"


async def test_one_that_died_while_it_waited_is_not_handed_out(node):
    await node.start(SandboxSpec("vm-a", 2, 512))
    await until(lambda: len(warm(node)) == 2)
    dead = warm(node)[0].machine
    os.kill(dead.pid, signal.SIGKILL)
    await until(lambda: not dead.alive)
    await node.start(SandboxSpec("vm-b", 2, 512))
    assert (await node.execute("vm-b", Command("print(1)", "python", 60))).stdout == "1\n"


async def test_an_unused_pool_is_drained(node, monkeypatch):
    await node.start(SandboxSpec("vm-a", 2, 512))
    await until(lambda: len(warm(node)) == 2)
    monkeypatch.setattr(machines, "DEMAND_MEMORY_S", 0.05)
    for shelf in node._machines._shelves.values():
        shelf.changed.set()
    await until(lambda: not warm(node))


async def test_spare_machines_follow_what_was_asked_for_of_late(settings, short_folder, monkeypatch):
    own = probed.at(settings, short_folder / "spares", spare_machines=1, spare_machines_max=3)
    async with Runtime.open(own) as node:
        for name in ("vm-a", "vm-b", "vm-c", "vm-d"):
            await node.start(SandboxSpec(name, 2, 512))
        await until(lambda: len(node._machines.prepared()) == 3)
        (shelf,) = node._machines._shelves.values()
        monkeypatch.setattr(machines, "DEMAND_MEMORY_S", 0.01)  # as if that was long ago
        shelf.changed.set()
        await until(lambda: len(node._machines.prepared()) == 1)
    assert inventory.take(own.state_dir) == inventory.Inventory(frozenset(), frozenset())
