"""A node whose sandboxes look names up in an internet of the test's own."""

from __future__ import annotations

import itertools

import pytest
from internet import internet

from instavm.node import inventory
from instavm.node.runtime import Runtime
from instavm.sandbox import Command, Egress, SandboxSpec

__all__ = ["internet"]

NAMES = itertools.count(1)


@pytest.fixture(autouse=True)
def clean(request):
    if "internet" in request.fixturenames:
        request.getfixturevalue("internet").forget()


class Live:
    """A sandbox as a test sees it."""

    def __init__(self, node, vm_id):
        self.node, self.vm_id = node, vm_id

    async def python(self, code, timeout_s=60.0):
        return await self.node.execute(self.vm_id, Command(code, "python", timeout_s))

    async def bash(self, code, timeout_s=60.0):
        return await self.node.execute(self.vm_id, Command(code, "bash", timeout_s))

    async def allow(self, **egress):
        await self.node.set_egress(self.vm_id, Egress(**egress))

    async def get(self, url, *options):
        """What curl makes of it: the body, or the error's number."""
        words = " ".join(f"'{word}'" for word in options)
        done = await self.bash(f"curl -sk -m 20 {words} '{url}' || echo curl $?")
        return done.stdout.strip()

    async def log(self):
        return (await self.node.egress_log(self.vm_id)).seen

    @property
    def network(self):
        return self.node._live[self.vm_id].prepared.network


@pytest.fixture(scope="session")
async def node(settings, internet, anyio_backend):
    mine = settings.model_copy(update={"egress_dns": (internet.a,), "egress_connections": 20})
    async with Runtime.open(mine) as node:
        yield node
    assert inventory.take(settings.state_dir) == inventory.Inventory(frozenset(), frozenset())
    assert len(node._networks) == 0


@pytest.fixture(scope="session")
async def shared(node):
    """One sandbox for all tests that only look at what gets through."""
    await node.start(SandboxSpec("vm-shared", 2, 512))
    yield Live(node, "vm-shared")
    await node.stop("vm-shared")


@pytest.fixture
async def sandbox(shared):
    """It reaches nothing when a test begins."""
    await shared.allow()
    return shared


@pytest.fixture
async def start(node):
    started = []

    async def start(egress=None):
        vm_id = f"vm-net{next(NAMES)}"
        await node.start(SandboxSpec(vm_id, 2, 512, egress=egress or Egress()))
        started.append(vm_id)
        return Live(node, vm_id)

    yield start
    for vm_id in started:
        await node.stop(vm_id)
