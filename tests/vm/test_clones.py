"""What clones of one template must not share, and how they are right about the time."""

import json
import time

import anyio
import pytest

pytestmark = pytest.mark.anyio

IDENTITY = """
import json, os, random, secrets, socket, uuid
print(json.dumps({
    "urandom": os.urandom(1024).hex(), "random": random.random(), "uuid4": str(uuid.uuid4()),
    "secrets": secrets.token_hex(16), "hostname": socket.gethostname(),
    "etc_hostname": open("/etc/hostname").read(), "machine_id": open("/etc/machine-id").read(),
    "boot_id": open("/proc/sys/kernel/random/boot_id").read(), "numpy": __import__("numpy").random.random(),
}))
"""


async def test_clones_differ_in_everything_that_makes_a_machine_unique(start):
    clones = [await start() for _ in range(3)]
    seen = [json.loads((await clone.python(IDENTITY)).stdout) for clone in clones]
    for name in seen[0]:
        values = [one[name] for one in seen]
        assert len(set(values)) == len(values), f"{name} is shared: {values}"
    for clone, one in zip(clones, seen, strict=True):
        assert one["hostname"] == clone.vm_id
        assert one["etc_hostname"] == clone.vm_id + "\n"
        assert len(one["machine_id"].strip()) == 32


async def test_bash_comes_first_and_is_unique_too(start):
    clones = [await start() for _ in range(2)]
    drawn = [(await clone.bash("head -c 32 /dev/urandom | base64; echo $RANDOM; hostname")).stdout for clone in clones]
    assert all(one != other for one, other in zip(*(text.splitlines() for text in drawn), strict=True))


async def test_the_clock_is_right_although_the_template_is_older(sandbox):
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


async def test_many_start_at_once(start):
    lives = []

    async def one():
        live = await start()
        lives.append((await live.python("print(1)")).stdout)

    async with anyio.create_task_group() as tasks:
        for _ in range(6):
            tasks.start_soon(one)
    assert lives == ["1\n"] * 6
