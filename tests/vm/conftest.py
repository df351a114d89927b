"""Real sandboxes: one node for the whole run, its template booted once, a sandbox restored for each test."""

from __future__ import annotations

import itertools

import anyio
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec
from instavm.node import inventory
from instavm.node.runtime import Runtime

NAMES = itertools.count(1)


class Live:
    """A sandbox as a test sees it."""

    def __init__(self, node, started):
        self.node = node
        self.started = started
        self.vm_id = started.vm_id

    async def python(self, code, timeout_s=60.0):
        return await self.node.execute(self.vm_id, Command(code, "python", timeout_s))

    async def bash(self, code, timeout_s=60.0):
        return await self.node.execute(self.vm_id, Command(code, "bash", timeout_s))

    async def stop(self):
        await self.node.stop(self.vm_id)

    @property
    def machine(self):
        return self.node._live[self.vm_id].prepared.machine


@pytest.fixture(scope="session")
async def node(settings, anyio_backend):
    async with Runtime.open(settings) as node:
        node.ended = []
        node.on_end(node.ended.append)
        yield node
    assert inventory.take(settings.state_dir) == inventory.Inventory(frozenset(), frozenset())


@pytest.fixture
async def start(node):
    """Start sandboxes of any size; they end with the test, and nothing of them may be left."""
    started = []

    async def start(vcpus=2, memory_mib=512, **env):
        spec = SandboxSpec(f"vm-test{next(NAMES)}", vcpus, memory_mib, env=env)
        live = Live(node, await node.start(spec))
        started.append(live)
        return live

    yield start
    for live in started:
        await live.stop()
    assert node._live == {}
    with anyio.fail_after(30):
        while inventory.take(node._settings.state_dir) != waiting(node) or not networks_match(node):
            await anyio.sleep(0.02)  # a spare machine is being made


@pytest.fixture
def quiet(node):
    """Wait until no machine is being made ahead: one in the making has more processes than one that waits."""

    async def quiet():
        wanted, shelves = node._settings.spare_machines, node._machines._shelves
        with anyio.fail_after(60):
            while inventory.take(node._settings.state_dir) != waiting(node) or any(
                len(shelf.spare) < wanted for shelf in shelves.values()
            ):
                await anyio.sleep(0.02)

    return quiet


@pytest.fixture
async def sandbox(start):
    return await start()


def networks_match(node):
    """One network for each machine that waits, and no other."""
    return len(node._networks) == len(node._machines.prepared())


def waiting(node):
    """Machines that wait for a sandbox are no leftovers; whatever else runs or has a folder is."""
    ready = node._machines.prepared()
    names = frozenset(one.home.name for one in ready)
    return inventory.Inventory(frozenset(one.machine.pid for one in ready), names, names)
