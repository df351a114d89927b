"""A restored machine is saved without copying its memory, and goes on; what was saved goes on elsewhere."""

import pytest
from saved import parent_and_child, running, save

from instavm.contract.executions import Command
from instavm.errors import BootFailed, CorruptSnapshot
from instavm.node.vmm.firecracker import FirecrackerDriver

pytestmark = pytest.mark.anyio


async def test_parent_and_child_go_on_from_the_same_moment(driver, template, homes):
    await parent_and_child(driver, template, homes)


async def test_layers_are_merged_while_the_guest_runs(driver, template, homes):
    home = homes()
    async with running(driver, template, home) as (machine, agent):
        await agent.execute(Command("echo one > /app/file; sync", "bash", 60))
        await save(machine, template, home)
        if driver.name == FirecrackerDriver.name:
            with pytest.raises(BootFailed, match="can't be merged while they are used"):
                await machine.merge_layers(template.disk)
            return
        await machine.merge_layers(template.disk)
        (home / "disk.qcow2").write_bytes(b"nobody reads this any more")
        out = (await agent.execute(Command("echo 3 > /proc/sys/vm/drop_caches; cat /app/file", "bash", 60))).stdout
        assert out == "one\n"


@pytest.mark.parametrize("harm", ["cut", "magic", "index"])
async def test_pages_that_can_not_be_those_of_this_machine_are_refused(driver, template, homes, harm):
    home = homes()
    async with running(driver, template, home) as (machine, _):
        saved = await save(machine, template, home)
    whole = saved.changes.read_bytes()
    harmed = {"cut": whole[:-1], "magic": b"X" + whole[1:], "index": whole[:-24] + b"\xff" * 24}[harm]
    saved.changes.write_bytes(harmed)
    other = homes(home / "disk.qcow2")
    with pytest.raises(CorruptSnapshot):
        await driver.prepare(saved, other / "disk.qcow2", other, background=False)
