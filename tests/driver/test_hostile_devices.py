"""Root in a guest against its own devices: whatever it sends them, at most its own VMM ends."""

import contextlib
import re
from pathlib import Path

import anyio
import pytest
from saved import python, running

from instavm.errors import InstaVMError

pytestmark = pytest.mark.anyio
HOSTILE = (Path(__file__).parent / "hostile_guest.py").read_text()
PATIENCE_S = 120.0


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_malformed_requests_end_at_most_the_vmm_that_gets_them(driver, template, homes, seed):
    """Queues, descriptors, addresses and sizes that no driver would send, SCSI commands among them, 400 times at random."""
    async with running(driver, template, homes()) as (_, neighbour):
        async with running(driver, template, homes()) as (machine, agent), anyio.create_task_group() as tasks:
            tasks.start_soon(attack, agent, seed)
            said = await heard(machine)
            tasks.cancel_scope.cancel()
        assert re.search(r"hostile: has \d devices", said), said[-2000:]
        assert await python(neighbour, "print(6 * 7)") == "42\n"


async def attack(agent, seed):
    with contextlib.suppress(InstaVMError):  # the line to the agent is one of the devices that it takes away
        await python(agent, f"seed = {seed}\n{HOSTILE}")


async def heard(machine):
    """What the guest says on its console until it is done, or its VMM has ended. Raises TimeoutError: it did neither."""
    said = ""
    with anyio.fail_after(PATIENCE_S):
        while machine.alive and "hostile: done" not in said:
            said += await machine.console()
            await anyio.sleep(0.05)
    return said
