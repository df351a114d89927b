"""Networks on a host that has many of them."""

import os
import resource
from contextlib import ExitStack

import pytest

from instavm.contract.egress import EgressLog
from instavm.node.network import rules, space
from instavm.node.network.guard import Networks

pytestmark = pytest.mark.anyio
SELECT_MAX = 1024


@pytest.fixture
def many_descriptors():
    """As many as select(2) knows, and some more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:
        for _ in range(SELECT_MAX + 100):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_network_is_made_whatever_number_its_descriptors_get(many_descriptors):
    before = len(os.listdir("/proc/self/fd"))
    made = space.make()
    try:
        assert made.fd > SELECT_MAX
        assert rules.refused(space.apply(made, rules.LIST_REFUSED)) == []
    finally:
        made.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_filter_hears_of_networks_that_come_while_it_is_told_of_others(settings):
    networks = Networks(settings)
    async with networks.open():
        made = []
        while not networks._ready.is_set():
            networks._hurry()
            made.append(await networks.make())
        try:
            for one in made:
                assert await one.log() == EgressLog()
        finally:
            for one in made:
                await one.aclose()
        assert len(networks) == 0
