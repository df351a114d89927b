"""Snapshots of the disk of a sandbox that goes on: how long it waits, what is kept, and that chains stay short."""

import subprocess

import anyio
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec
from instavm.errors import SnapshotError
from instavm.node.layers import DEEP, held
from instavm.node.snapshots import PIN

pytestmark = pytest.mark.anyio


@pytest.fixture
async def names(node):
    made = [f"snap-test{number}" for number in range(DEEP + 3)]
    yield made
    for name in made:
        await node.forget(name)
    assert await node.stored() == {} and await node.clear_up(dry_run=True) == []


async def test_many_in_a_row_beside_a_writer_and_the_chain_stays_short(node, sandbox, names):
    await sandbox.bash(
        "(n=0; while :; do n=$((n+1)); echo $n > /app/n; dd if=/dev/urandom of=/app/noise bs=64k count=4 2>/dev/null; done) &"
    )
    home = node._live[sandbox.vm_id].prepared.home
    for number, name in enumerate(names):
        await sandbox.bash(f"echo {number} > /app/kept-{number}")
        stored = await node.snapshot(sandbox.vm_id, name)
        assert 0 < stored.pause_ms < 5000
    with anyio.fail_after(60):
        while len(held(home)) > DEEP:
            await anyio.sleep(0.1)
    for name in names[:3]:
        await node.forget(name)
    assert (await sandbox.bash("cat /app/kept-* | tr '\\n' ' '; kill %1 2>/dev/null; sync")).stdout == "".join(
        f"{number} " for number in range(len(names))
    )
    last = node._snapshots.read(names[-1]).disk
    for disk in (node._layers.path(last), node._live[sandbox.vm_id].prepared.disk):
        told = subprocess.run(["qemu-img", "info", "-U", "--backing-chain", disk], capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
    assert subprocess.run(["qemu-img", "check", "-q", node._layers.path(last)]).returncode == 0


async def test_a_snapshot_has_what_was_written_and_not_what_came_later(node, sandbox, names):
    await sandbox.python("f = open('/app/f', 'w'); _ = f.write('before' * 1000); f.flush()")
    await node.snapshot(sandbox.vm_id, names[0])
    await sandbox.python("_ = f.write('after'); f.close(); x = 1")
    await sandbox.stop()
    spec = SandboxSpec("vm-from-snapshot", 1, 256, image=names[0])
    started = await node.start(spec)
    try:
        assert started.cold
        out = await node.execute(
            spec.vm_id, Command("import os; print(open('/app/f').read() == 'before' * 1000)", "python", 60)
        )
        assert out.stdout == "True\n"
        await node.forget(names[0])
        assert (
            await node.execute(spec.vm_id, Command("cat /usr/bin/env | wc -c > /app/x; cat /app/x", "bash", 60))
        ).stdout > "1"
    finally:
        await node.stop(spec.vm_id)


async def test_a_freeze_ends_by_itself_and_a_snapshot_under_it_is_refused(node, sandbox, names, monkeypatch):
    agent = node._live[sandbox.vm_id].agent
    await agent.freeze()
    with anyio.fail_after(30):
        assert (await sandbox.bash("echo x > /app/file; cat /app/file")).stdout == "x\n", "it was let go"
    assert not await agent.thaw()

    async def slow(*_):
        await anyio.sleep(9)
        return await type(agent).thaw(agent)

    monkeypatch.setattr(agent, "thaw", slow)
    with pytest.raises(SnapshotError, match="did not hold still"):
        await node.snapshot(sandbox.vm_id, names[0])
    monkeypatch.undo()
    assert await node.stored() == {}
    assert (await sandbox.bash("echo y > /app/file; cat /app/file")).stdout == "y\n"
    await node.snapshot(sandbox.vm_id, names[0])


async def test_a_machine_that_is_being_made_ahead_goes_with_its_snapshot(node, sandbox, names):
    """The snapshot is deleted just while a spare machine of it comes up: neither that nor a layer of it may stay."""
    await node.snapshot(sandbox.vm_id, names[0])
    await sandbox.stop()

    def standing():
        """The machines that stand on a template of it."""
        own = {path.stat().st_ino for path in node._templates.own.glob(f"*/{PIN}")}
        return [pin for pin in node._machines.folder.glob(f"*/{PIN}") if pin.stat().st_ino in own]

    await node.start(SandboxSpec("vm-of-snapshot", 1, 256, image=names[0]))
    try:
        with anyio.fail_after(60):
            while len(standing()) < 2:  # the sandbox, and the spare one that is being made
                await anyio.sleep(0.001)
        await node.forget(names[0])
    finally:
        await node.stop("vm-of-snapshot")
    with anyio.fail_after(60):
        while standing():
            await anyio.sleep(0.02)
    await node.clear_up(dry_run=False)
    assert not any((node._settings.state_dir / "layers").iterdir())
