"""A host that lacks something, or a guest that does not answer: a typed error, nothing left, and the node goes on."""

import json
import os
import signal
import subprocess
import sys

import anyio
import probed
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import EndReason, SandboxSpec
from instavm.errors import BootFailed, DiskFull, HostNotReady, OutcomeUnknown
from instavm.node import inventory
from instavm.node.machines import Machines
from instavm.node.runtime import Runtime
from instavm.node.vmm.qemu import QemuMachine

pytestmark = pytest.mark.anyio
SPEC = SandboxSpec("vm-trouble", 2, 512)
NOTHING = inventory.Inventory(frozenset(), frozenset())


@pytest.fixture
def own(settings, short_folder, request):
    """Settings of a node that is this test's alone."""
    return probed.at(settings, short_folder / request.node.name[5:20], spare_machines=0)


async def test_a_guest_that_never_answers_is_given_up(own, monkeypatch):
    load = QemuMachine.load

    async def load_and_freeze(machine, **how):
        await load(machine, **how)
        await machine.pause()

    impatient = own.model_copy(update={"restore_timeout_s": 1.0})
    async with Runtime.open(impatient) as node:
        with monkeypatch.context() as patch:
            patch.setattr(QemuMachine, "load", load_and_freeze)
            with pytest.raises(BootFailed, match="did not answer within 1 s"):
                await node.start(SPEC)
        assert inventory.take(own.state_dir) == NOTHING
        await node.start(SPEC)
        assert (await node.execute(SPEC.vm_id, Command("print(1)", "python", 60))).stdout == "1\n"


async def test_a_full_disk_is_told_and_leaves_nothing(own):
    own.state_dir.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", own.state_dir], check=True)
    try:
        async with Runtime.open(own) as node:
            with pytest.raises(DiskFull, match="MiB free, a sandbox needs at least 512"):
                await node.start(SPEC)
            assert inventory.take(own.state_dir) == NOTHING
    finally:
        subprocess.run(["umount", own.state_dir], check=True)


async def test_a_sandbox_that_fills_the_hosts_disk_is_ended_and_its_neighbour_goes_on(own, short_folder):
    """A disk of its own, and no tmpfs: what is written there would count as memory of the VMM."""
    own.state_dir.mkdir(exist_ok=True)
    with (short_folder / "disk").open("wb") as disk:
        disk.truncate(800 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", disk.name], check=True)
    subprocess.run(["mount", "-o", "loop", disk.name, own.state_dir], check=True)
    try:
        async with Runtime.open(own) as node:
            ended = []
            node.on_end(ended.append)
            neighbour = SandboxSpec("vm-neighbour", 2, 512)
            await node.start(SPEC)
            await node.start(neighbour)
            fill = "head -c 700M /dev/zero | tr '\\0' x > /app/big"
            with pytest.raises(OutcomeUnknown):
                await node.execute(SPEC.vm_id, Command(fill, "bash", 200))
            with anyio.fail_after(10):
                while not ended:
                    await anyio.sleep(0.02)
            assert [(end.vm_id, end.reason) for end in ended] == [(SPEC.vm_id, EndReason.OVER_LIMIT)]
            assert "the host's disk is full" in ended[0].detail
            wrote = await node.execute(
                neighbour.vm_id, Command("head -c 1M /dev/zero > /app/x; sync; ls /app", "bash", 60)
            )
            assert wrote.stdout == "x\n"
    finally:
        subprocess.run(["umount", own.state_dir], check=True)


async def test_an_image_that_is_not_there_says_how_to_get_it(own, monkeypatch):
    async with Runtime.open(own) as node:
        monkeypatch.setattr(node._images, "find", lambda name: None)
        with pytest.raises(HostNotReady, match="scripts/start"):
            await node.start(SPEC)


async def test_a_state_directory_has_one_owner(own):
    async with Runtime.open(own):
        with pytest.raises(HostNotReady, match="another server uses"):
            async with Runtime.open(own):
                pass


async def test_a_template_that_was_altered_is_made_again(own, settings, short_folder):
    """Found before any guest runs on it; the next sandbox gets a new one."""
    cache = short_folder / "cache"
    cache.mkdir()
    for shared in ("kernels", "bases", "guests", "images"):
        (cache / shared).symlink_to(settings.cache_dir / shared)
    own = own.model_copy(update={"cache_dir": cache})
    async with Runtime.open(own) as node:
        assert (await node.start(SPEC)).cold
    (template,) = [folder for folder in (cache / "templates").iterdir() if folder.is_dir()]
    with (template / "state").open("r+b") as file:
        file.seek(2000)
        file.write(b"flipped")
    async with Runtime.open(own) as node:
        started = await node.start(SPEC)
        assert started.cold
        assert (await node.execute(SPEC.vm_id, Command("print(1)", "python", 60))).stdout == "1\n"
    assert json.loads((template / "template.json").read_text())["memory_mib"] == 512


SERVER = """
import anyio, sys
from instavm.node.runtime import Runtime
from instavm.contract.executions import Command
from instavm.contract.sandboxes import EndReason, SandboxSpec
from instavm.settings import Settings

async def main():
    async with Runtime.open(Settings()) as node:
        for number in range(3):
            await node.start(SandboxSpec(f"vm-orphan{number}", 2, 512))
            await node.execute(f"vm-orphan{number}", Command(f"x = {number}", "python", 60))
        print("up", flush=True)
        if "leave" in sys.argv:
            await node.leave()
        else:
            await anyio.sleep_forever()

anyio.run(main)
"""


async def serve_and_go(own, how):
    """A server with three sandboxes that is killed (kill -9 gives nobody a chance to do anything), or leaves them."""
    env = {**os.environ, "INSTAVM_STATE_DIR": str(own.state_dir), "INSTAVM_CACHE_DIR": str(own.cache_dir)}
    async with await anyio.open_process([sys.executable, "-c", SERVER, how], env=env, stderr=None) as server:
        assert (await server.stdout.receive()).strip() == b"up"
        if how == "killed":
            server.send_signal(signal.SIGKILL)
        await server.wait()


@pytest.mark.parametrize("how", ["killed", "leave"])
async def test_sandboxes_outlive_their_server_and_are_adopted_by_the_next(own, how):
    await serve_and_go(own, how)
    async with Runtime.open(own) as node:
        assert set(await node.adopted()) == {f"vm-orphan{number}" for number in range(3)}
        for number in range(3):
            outcome = await node.execute(f"vm-orphan{number}", Command("print(x)", "python", 60))
            assert outcome.stdout == f"{number}\n"
        assert len(inventory.take(own.state_dir).homes) == 3, "spare machines of the old server are still there"
    assert inventory.take(own.state_dir) == NOTHING


async def test_a_machine_that_is_nobodys_or_dead_is_removed(own):
    await serve_and_go(own, "killed")
    folder = own.state_dir / "machines"
    machines = inventory.running(folder)
    taken = [name for name in machines if (folder / name / "sandbox.json").exists()]
    (folder / taken[0] / "sandbox.json").write_text("{")
    os.kill(machines[taken[1]], signal.SIGKILL)
    async with Runtime.open(own) as node:
        assert len(await node.adopted()) == 1
        assert inventory.take(own.state_dir).homes == {taken[2]}
    assert inventory.take(own.state_dir) == NOTHING


async def test_a_foreign_process_is_never_taken_for_a_machine(own, tmp_path):
    """Mentioning the folder is not enough, whatever its number was before."""
    folder = own.state_dir / "machines"
    folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"], executable="/bin/sleep") as bystander:
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)", f"{folder}/x"]) as named:
            try:
                assert inventory.clear(own.state_dir) == []
                assert bystander.poll() is None and named.poll() is None
            finally:
                named.kill()
                bystander.kill()


async def test_spare_machines_end_with_the_node(own):
    spares = own.model_copy(update={"spare_machines": 2})
    async with Runtime.open(spares) as node:
        await node.start(SPEC)
        with anyio.fail_after(60):
            while len(node._machines.prepared()) < 2:
                await anyio.sleep(0.02)
        assert isinstance(node._machines, Machines)
    assert inventory.take(own.state_dir) == NOTHING
