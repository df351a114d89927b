"""What clones of one template must not share, and how they are right about the time."""

import secrets
import time
from functools import partial

import anyio
import pytest

from instavm.node import identity
from instavm.node.clones import PROBES, compare
from instavm.node.vmm import pages

pytestmark = pytest.mark.anyio


async def test_eight_clones_share_nothing_that_makes_a_machine_unique(start):
    """The first to run in each of them is a shell, so that nothing warmed anything up."""
    clones = [await start() for _ in range(8)]
    found = await compare([partial(clone.node.execute, clone.vm_id) for clone in clones])
    assert [one.probe for one in found if one.bad] == []
    there = {one.probe for one in found if one.there}
    always = {name for name in PROBES if "OpenSSL" not in name and "ssh-keygen" not in name and "numpy" not in name}
    assert always <= there, "everything that every image has was really asked"
    for clone in clones:
        assert (await clone.bash("hostname; cat /etc/hostname")).stdout == f"{clone.vm_id}\n" * 2


async def test_what_clones_do_share_is_known_and_explained(start):
    """So that the comparison is known to see what is the same."""
    clones = [await start() for _ in range(2)]
    found = await compare([partial(clone.node.execute, clone.vm_id) for clone in clones])
    assert {one.probe for one in found if one.shared} == {
        name for name, probe in PROBES.items() if probe.shared_because
    }


async def test_bash_comes_first_and_is_unique_too(start):
    clones = [await start() for _ in range(2)]
    drawn = [(await clone.bash("head -c 32 /dev/urandom | base64; echo $RANDOM; hostname")).stdout for clone in clones]
    assert all(one != other for one, other in zip(*(text.splitlines() for text in drawn), strict=True))


async def test_the_clock_is_right_although_the_template_is_older(sandbox):
    before = time.time()
    inside = float((await sandbox.python("import time; print(time.time())")).stdout)
    assert before - 0.5 < inside < time.time() + 0.5


async def test_the_clock_is_right_although_the_identity_was_long_on_its_way(sandbox):
    """As it is on a host that is busy with many others."""
    agent = sandbox.node._live[sandbox.vm_id].prepared.agent
    await agent.identify({**identity.fresh(sandbox.vm_id, {}), "time_ns": time.time_ns() - 5 * 10**9})
    before = time.time()
    inside = float((await sandbox.python("import time; print(time.time())")).stdout)
    assert before - 0.5 < inside < time.time() + 0.5


async def test_what_one_clone_writes_the_other_never_sees(start):
    one, other = await start(), await start()
    await one.bash("echo secret > /app/file; sync")
    await one.python("secret = 1")
    assert (await other.bash("ls /app")).stdout == ""
    assert "NameError" in (await other.python("secret")).stderr
    assert (await (await start()).bash("ls /app")).stdout == ""


async def test_what_one_tenant_writes_is_in_no_page_that_another_has(start, tmp_path):
    """S18: of one template, each has its own copy of what it has written, in memory and on disk; the template has none."""
    one, other = await start(), await start()
    secret = secrets.token_hex(24)
    await one.python(f"secret = '{secret}'; open('/app/file', 'w').write(secret)")
    await one.bash("sync")
    held = {}
    for live in (one, other):
        prepared = live.node._live[live.vm_id].prepared
        template = await live.node._templates.by_key(prepared.template)
        await prepared.machine.pause()
        with (tmp_path / live.vm_id).open("wb") as into:
            pages.save(prepared.machine.pid, template.saved.memory, into.fileno())
        held[live.vm_id] = [tmp_path / live.vm_id, prepared.disk]
    held["template"] = [file for file in template.folder.iterdir() if file.is_file()]
    found = {name: [secret.encode() in file.read_bytes() for file in files] for name, files in held.items()}
    assert found == {one.vm_id: [True, True], other.vm_id: [False, False], "template": [False] * len(held["template"])}
    for file in held["template"]:
        assert not file.stat().st_mode & 0o222, "and nobody can write there"


async def test_many_start_at_once(start):
    lives = []

    async def one():
        live = await start()
        lives.append((await live.python("print(1)")).stdout)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(one)
    assert lives == ["1\n"] * 6
