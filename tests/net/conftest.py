"""A node whose sandboxes look names up in an internet of the test's own."""

from __future__ import annotations

import itertools

import probed
import pytest
from internet import Live

from instavm.contract.egress import Egress
from instavm.contract.sandboxes import SandboxSpec
from instavm.node import inventory
from instavm.node.runtime import Runtime

NAMES = itertools.count(1)


@pytest.fixture(autouse=True)
def clean(request):
    if "internet" in request.fixturenames:
        request.getfixturevalue("internet").forget()


@pytest.fixture(scope="session")
async def node(settings, short_folder, internet, anyio_backend):
    mine = probed.at(settings, short_folder / "net", egress_dns=(internet.a,), egress_connections=20)
    async with Runtime.open(mine) as node:
        yield node
    assert inventory.take(mine.state_dir) == inventory.Inventory(frozenset(), frozenset())
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
