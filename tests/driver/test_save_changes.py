"""A restored machine is saved without copying its memory, and goes on; what was saved goes on elsewhere."""

import shutil

import anyio
import pytest

from instavm.errors import BootFailed, CorruptSnapshot
from instavm.node import identity
from instavm.node.agent import Agent, connected
from instavm.node.layers import overlay
from instavm.node.machines import make_home
from instavm.node.vmm.base import Saved
from instavm.node.vmm.firecracker import FirecrackerDriver
from instavm.sandbox import Command

pytestmark = pytest.mark.anyio


@pytest.fixture
def homes(short_folder, template, furnish):
    """Folders for machines: the first on an empty overlay, the others on what they are told."""
    made = []

    def make(backing=None):
        home = short_folder / f"home-{len(made)}"
        make_home(
            home,
            template,
            furnish if backing is None else lambda home: overlay(template.blank, backing, home / "disk.qcow2"),
        )
        made.append(home)
        return home

    yield make
    for home in made:
        shutil.rmtree(home)


async def python(agent, code):
    return (await agent.execute(Command(code, "python", 60))).stdout


async def save(machine, template, home):
    """Everything that tells it from its template: its pages, its devices, and its disk, which stays below a new layer."""
    await machine.pause()
    overlay(template.blank, home / "disk.qcow2", home / "disk-2.qcow2")
    await machine.save_changes(template.saved.memory, home / "state", home / "changes")
    await machine.new_layer(home / "disk-2.qcow2")
    await machine.resume()
    layers = (home / "disk.qcow2", *template.saved.layers)
    return Saved(template.saved.spec, template.saved.memory, home / "state", layers, home / "changes")


async def test_parent_and_child_go_on_from_the_same_moment(driver, template, homes):
    home = homes()
    parent = await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)
    try:
        async with connected(await parent.dial()) as agent:
            await parent.load()
            await agent.identify(identity.fresh("vm-parent", {}))
            await python(agent, "import os; big = os.urandom(20 << 20); x = 1; f = open('/app/open', 'w')")
            await agent.execute(Command("echo before > /app/file; sleep 1000 &", "bash", 60))
            saved = await save(parent, template, home)
            await python(agent, "x = 2; open('/app/file', 'a').write('parent')")
            told = await python(agent, "import hashlib; print(hashlib.sha256(big).hexdigest())")
            other = homes(home / "disk.qcow2")
            child = await driver.prepare(saved, other / "disk.qcow2", other, background=False)
            try:
                line = Agent(await child.dial())
                await child.load()
                await line.sync(10)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(line.run)
                    await line.identify(identity.fresh("vm-child", {}))
                    assert await python(line, "print(x, open('/app/file').read())") == "1 before\n\n"
                    assert await python(line, "import hashlib; print(hashlib.sha256(big).hexdigest())") == told
                    assert await python(line, "f.write('still open'); f.close(); print(open('/app/open').read())")
                    assert (await line.execute(Command("pgrep -c sleep", "bash", 60))).stdout == "1\n"
                    tasks.cancel_scope.cancel()
            finally:
                await child.aclose()
            assert await python(agent, "print(x, open('/app/file').read())") == "2 before\nparent\n"
    finally:
        await parent.aclose()


async def test_layers_are_merged_while_the_guest_runs(driver, template, homes):
    home = homes()
    machine = await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)
    try:
        async with connected(await machine.dial()) as agent:
            await machine.load()
            await agent.identify(identity.fresh("vm-x", {}))
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
    finally:
        await machine.aclose()


@pytest.mark.parametrize("harm", ["cut", "magic", "index"])
async def test_pages_that_can_not_be_those_of_this_machine_are_refused(driver, template, homes, harm):
    home = homes()
    machine = await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)
    try:
        async with connected(await machine.dial()) as agent:
            await machine.load()
            await agent.identify(identity.fresh("vm-x", {}))
            saved = await save(machine, template, home)
    finally:
        await machine.aclose()
    whole = saved.changes.read_bytes()
    harmed = {"cut": whole[:-1], "magic": b"X" + whole[1:], "index": whole[:-24] + b"\xff" * 24}[harm]
    saved.changes.write_bytes(harmed)
    other = homes(home / "disk.qcow2")
    with pytest.raises(CorruptSnapshot):
        await driver.prepare(saved, other / "disk.qcow2", other, background=False)
