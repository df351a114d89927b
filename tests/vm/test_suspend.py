"""Put to rest and brought back: every process, variable, open file and byte, ten times over; and what is refused (R13, R14)."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import replace

import anyio
import probed
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec
from instavm.errors import CorruptSnapshot, DiskFull, SessionEnded, SnapshotError
from instavm.node import inventory, saving
from instavm.node.runtime import Runtime
from instavm.node.snapshots import CHANGES, DESCRIPTION, STATE

pytestmark = pytest.mark.anyio

PROBE = """
import hashlib, os
ram = bytearray(os.urandom(8 << 20))
disk = open('/app/probe', 'w+b')
disk.write(os.urandom(8 << 20)); disk.flush()
def change(n):
    ram[n * 4096 + 17 : n * 4096 + 97] = os.urandom(80)
    disk.seek(n * 65536 + 5); disk.write(os.urandom(300)); disk.flush()
def sums():
    disk.seek(0)
    print(hashlib.sha256(ram).hexdigest(), hashlib.sha256(disk.read()).hexdigest())
"""


@pytest.fixture
async def resume(node, start):
    """Bring back what is at rest; nothing of it may be left after the test."""
    lives = []

    async def resume(name, **env):
        vm_id = f"{name.split('.')[0]}.{len(lives) + 1}"
        spec = SandboxSpec(vm_id, 1, 256, env=env, resumes=name)
        await node.start(spec)
        lives.append(vm_id)
        return vm_id

    yield resume
    for vm_id in lives:
        await node.stop(vm_id)
    for name in await node.stored():
        await node.forget(name)
    assert await node.clear_up(dry_run=True) == []
    assert not any((node._settings.state_dir / "layers").iterdir()), "layers are left"


async def python(node, vm_id, code):
    return (await node.execute(vm_id, Command(code, "python", 60))).stdout


async def test_everything_is_there_again_and_the_clock_is_right(node, sandbox, resume, quiet):
    await sandbox.python("import threading, time; x = 42; f = open('/app/open', 'w'); f.write('be'); y = []")
    await sandbox.python(
        "threading.Thread(target=lambda: [(y.append(1), time.sleep(.05)) for _ in range(10**6)]).start()"
    )
    ticks = "while :; do date +%s.%N > /app/tock; mv /app/tock /app/tick; sleep .1; done"
    await sandbox.bash(f"({ticks}) & echo $! > /app/pid; export A=1")
    pid = sandbox.machine.pid
    stored = await node.suspend(sandbox.vm_id)
    assert 0 < stored.own_bytes < 200 << 20
    assert not os.path.exists(f"/proc/{pid}"), "its memory is not freed"
    await quiet()  # nothing is there but the machines that wait
    with pytest.raises(SessionEnded):
        await python(node, sandbox.vm_id, "1")
    await anyio.sleep(1.5)  # the guest's clock must jump over this
    vm_id = await resume(sandbox.vm_id)
    assert (
        await python(node, vm_id, "print(x); f.write('fore'); f.close(); print(open('/app/open').read())")
        == "42\nbefore\n"
    )
    before = time.time()
    assert before - 0.5 < float(await python(node, vm_id, "print(time.time())")) < time.time() + 0.5
    assert await python(node, vm_id, "n = len(y); time.sleep(.5); print(len(y) > n)") == "True\n"
    assert (
        await node.execute(vm_id, Command("kill -0 $(cat /app/pid) && hostname", "bash", 60))
    ).stdout == vm_id + "\n"
    tick = float((await node.execute(vm_id, Command("sleep .5; cat /app/tick", "bash", 60))).stdout)
    assert abs(tick - time.time()) < 2.0


async def test_ten_times_in_a_row_with_writes_in_between(node, sandbox, resume):
    await sandbox.python(PROBE)
    vm_id = sandbox.vm_id
    for number in range(10):
        await python(node, vm_id, f"change({number * 7})")
        sums = await python(node, vm_id, "sums()")
        await node.suspend(vm_id)
        old, vm_id = vm_id, await resume(vm_id)
        assert await python(node, vm_id, "sums()") == sums
        await node.forget(old)
    await python(node, vm_id, "disk.close()")
    check = "import hashlib; print(hashlib.sha256(open('/app/probe', 'rb').read()).hexdigest() in " + repr(sums) + ")"
    drop = Command("sync; echo 3 > /proc/sys/vm/drop_caches", "bash", 60)
    await node.execute(vm_id, drop)
    assert await python(node, vm_id, check) == "True\n"


async def test_what_is_at_rest_can_be_resumed_again_when_it_did_not_come_up(node, sandbox, resume, monkeypatch):
    await sandbox.python("x = 1")
    await node.suspend(sandbox.vm_id)
    with monkeypatch.context() as patch:
        patch.setattr(node._settings.__class__, "restore_timeout_s", property(lambda self: 0.0001), raising=False)
        with pytest.raises(Exception, match="did not"):
            await resume(sandbox.vm_id)
    assert await python(node, await resume(sandbox.vm_id), "print(x)") == "1\n"


def flip(path, at=-5000):
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def cut(path):
    os.chmod(path, 0o600)
    os.truncate(path, path.stat().st_size - 1)


def told(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize("what", [STATE, CHANGES, "layer", DESCRIPTION])
@pytest.mark.parametrize("harm", [flip, cut])
async def test_altered_or_cut_off_is_refused_before_the_guest_runs(node, sandbox, resume, what, harm):
    await sandbox.python("open('/app/x', 'wb').write(b'y' * 300000)")
    await sandbox.bash("sync")
    await node.suspend(sandbox.vm_id)
    folder = node._snapshots.folder / sandbox.vm_id
    file = node._layers.path(node._snapshots.read(sandbox.vm_id).disk) if what == "layer" else folder / what
    harm(file) if what != DESCRIPTION or harm is cut else flip(file, 30)
    with pytest.raises(CorruptSnapshot, match=sandbox.vm_id):
        await resume(sandbox.vm_id)
    assert sandbox.vm_id + ".1" not in node._live


@pytest.mark.parametrize(
    ("which", "name"),
    [("vmm", "VMM"), ("cpu", "processor"), ("protocol", "guest protocol"), ("guest", "kernel and agent")],
)
async def test_from_another_host_or_version_is_refused(node, sandbox, resume, monkeypatch, which, name):
    """As if the host had changed since: its seal is right, what it was saved on is not there."""
    make = saving.Saving._manifest

    def other(self, *how):
        return replace(make(self, *how), **{which: 99 if which == "protocol" else "another"})

    with monkeypatch.context() as patch:
        patch.setattr(saving.Saving, "_manifest", other)
        await node.suspend(sandbox.vm_id)
    with pytest.raises(CorruptSnapshot, match=f"saved with another {name}"):
        await resume(sandbox.vm_id)


async def test_a_name_that_is_not_there(resume):
    with pytest.raises(SnapshotError, match="not on this host"):
        await resume("vm-never")


async def test_a_host_disk_that_is_full_leaves_the_sandbox_running(settings, short_folder):
    """R7: told as what it is, nothing half-made is left, and with space again it works."""
    state = short_folder / "full"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700m", "tmpfs", state], check=True)
    try:
        own = probed.at(settings, state, spare_machines=0)
        async with Runtime.open(own) as node:
            await node.start(SandboxSpec("vm-full", 2, 512))
            await python(node, "vm-full", "import os; data = os.urandom(40 << 20); x = 1")
            filler = state / "filler"
            with filler.open("wb") as file:
                file.write(bytes(shutil.disk_usage(state).free - (8 << 20)))
            forked = [SandboxSpec("vm-fork", 2, 512)]
            for what in (lambda: node.suspend("vm-full"), lambda: node.fork("vm-full", forked)):
                with pytest.raises(DiskFull, match="no space left"):
                    await what()
                assert await python(node, "vm-full", "x += 1; print(len(data), x > 1)") == f"{40 << 20} True\n"
                assert await node.stored() == {} and not list((state / "snapshots").iterdir())
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with pytest.raises(DiskFull):
                await node.snapshot("vm-full", "snap-full")
            assert await python(node, "vm-full", "print(x)") == "3\n"
            filler.unlink()
            assert await node.clear_up(dry_run=True) == []
            await node.suspend("vm-full")
            await node.start(SandboxSpec("vm-again", 2, 512, resumes="vm-full"))
            assert await python(node, "vm-again", "print(x, len(data))") == f"3 {40 << 20}\n"
        assert inventory.take(state).processes == frozenset()
    finally:
        subprocess.run(["umount", state], check=True)
