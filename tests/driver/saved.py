"""What the tests of saved machines share."""

from contextlib import asynccontextmanager

import anyio

from instavm.contract.executions import Command
from instavm.node import identity
from instavm.node.agent import Agent, connected
from instavm.node.layers import overlay
from instavm.node.vmm.base import Saved


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


@asynccontextmanager
async def running(driver, template, home):
    """A clone of the template that is somebody, and its agent."""
    machine = await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)
    try:
        async with connected(await machine.dial()) as agent:
            await machine.load()
            await agent.identify(identity.fresh("vm-x", {}))
            yield machine, agent
    finally:
        await machine.aclose()


async def parent_and_child(driver, template, homes):
    home = homes()
    async with running(driver, template, home) as (parent, agent):
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
