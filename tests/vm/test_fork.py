"""Copies of a sandbox that lives (S1, S3): the same memory and disk, and nothing that tells machines apart is shared."""

import json
import time

import anyio
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec, Started
from instavm.errors import BootFailed, SessionEnded

pytestmark = pytest.mark.anyio
NUMBERS = iter(range(1000))

LOADED = "import json, os, random, secrets, socket, ssl, subprocess, time, uuid; import numpy; x = list(range(1000))"
IDENTITY = """
def hello():
    context, incoming, outgoing = ssl.create_default_context(), ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname="h").do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()[11:43].hex()

print(json.dumps({
    "random": random.random(), "urandom": os.urandom(1024).hex(), "uuid4": str(uuid.uuid4()), "numpy": numpy.random.random(),
    "secrets": secrets.token_hex(16), "hello": hello(), "ssl": ssl.RAND_bytes(16).hex(),
    "key": subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519"], capture_output=True, text=True).stdout,
    "hostname": socket.gethostname(), "machine_id": open("/etc/machine-id").read(),
    "boot_id": open("/proc/sys/kernel/random/boot_id").read(), "mac": open("/sys/class/net/eth0/address").read(),
}))
"""


@pytest.fixture
async def fork(node):
    made = []

    async def fork(parent, count, **env):
        specs = [SandboxSpec(f"vm-fork{next(NUMBERS)}", 2, 512, env=env) for _ in range(count)]
        results = await node.fork(parent, specs)
        made.extend(one.vm_id for one in results if isinstance(one, Started))
        assert all(isinstance(one, Started) for one in results), results
        return [one.vm_id for one in results]

    yield fork
    for vm_id in made:
        await node.stop(vm_id)


async def python(node, vm_id, code):
    return (await node.execute(vm_id, Command(code, "python", 60))).stdout


async def test_eight_copies_share_nothing_that_makes_a_machine_unique(node, sandbox, fork):
    await sandbox.python(LOADED)
    ids = await fork(sandbox.vm_id, 8)
    seen = {}
    for vm_id in [*ids, sandbox.vm_id]:
        outcome = await node.execute(vm_id, Command(IDENTITY, "python", 60))
        assert outcome.exit_code == 0, outcome.stderr
        seen[vm_id] = json.loads(outcome.stdout)
    for name in seen[ids[0]]:
        values = [one[name] for one in seen.values()]
        assert len(set(values)) == len(values), f"{name} is shared: {values}"
    assert all(seen[vm_id]["hostname"] == vm_id for vm_id in ids)


async def test_memory_disk_and_processes_are_there_and_nobody_sees_the_others(node, sandbox, fork):
    await sandbox.python("x = 1; f = open('/app/f', 'w'); f.write('one ')")
    await sandbox.bash("sleep 1000 & echo parent > /app/file")
    ids = await fork(sandbox.vm_id, 2, COLOUR="red")
    await sandbox.python("x = 2; open('/app/file', 'a').write('parent again')")
    for number, vm_id in enumerate(ids):
        code = f"import os; print(x, os.environ['COLOUR'], open('/app/file').read().split()); x = 'c{number}'; _ = f.write('two')"
        assert await python(node, vm_id, code) == "1 red ['parent']\n"
        assert (await node.execute(vm_id, Command("pgrep -c sleep; echo $COLOUR", "bash", 60))).stdout == "1\nred\n"
    assert [await python(node, vm_id, "print(x); f.close(); print(open('/app/f').read())") for vm_id in ids] == [
        "c0\none two\n",
        "c1\none two\n",
    ]
    assert (await sandbox.python("import os; print(x, os.environ.get('COLOUR'))")).stdout == "2 None\n"
    before = time.time()
    assert before - 0.5 < float(await python(node, ids[0], "import time; print(time.time())")) < time.time() + 0.5


async def test_an_answer_to_the_parent_is_not_heard_of_the_copies(node, sandbox, fork):
    """What the parent was asked before goes on in the copy too, but answers nobody there."""
    answers = []

    async def ask():
        code = Command("import time; print('began', flush=True); time.sleep(3); n = 1; print('parent')", "python", 60)
        answers.append((await node.execute(sandbox.vm_id, code)).stdout)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask)
        await anyio.sleep(1.0)
        (child,) = await fork(sandbox.vm_id, 1)
        assert (await node.execute(child, Command("echo child", "bash", 60))).stdout == "child\n"
        assert await python(node, child, "print(n)") == "1\n", (
            "the cell that ran goes on, and the next one waits for it"
        )
    assert answers == ["began\nparent\n"]


async def test_sockets_inside_live_on_in_each_copy_alone(node, sandbox, fork):
    """There is no line to the outside; what connects processes of one sandbox connects those of one copy."""
    await sandbox.python(
        "import socket; s = socket.create_server(('127.0.0.1', 7000)); c = socket.create_connection(('127.0.0.1', 7000));"
        "a, _ = s.accept()"
    )
    (child,) = await fork(sandbox.vm_id, 1)
    await sandbox.python("c.send(b'parent')")
    await python(node, child, "c.send(b'child')")
    assert await python(node, child, "print(a.recv(100))") == "b'child'\n"
    assert (await sandbox.python("print(a.recv(100))")).stdout == "b'parent'\n"


async def test_copies_of_copies_and_a_parent_that_ends(node, start, fork):
    sandbox = await start()
    vm_id, trail = sandbox.vm_id, []
    for generation in range(7):
        await python(node, vm_id, f"g = {generation}; open('/app/g{generation}', 'w').write('x' * 100000)")
        trail.append(vm_id)
        (vm_id,) = await fork(vm_id, 1)
    for old in trail:
        await node.stop(old)
    code = "import os; print(g, sorted(os.listdir('/app')), sum(len(open('/app/' + n).read()) for n in os.listdir('/app')))"
    names = [f"g{generation}" for generation in range(7)]
    assert await python(node, vm_id, code) == f"6 {names} 700000\n"


async def test_one_that_is_gone_can_not_be_copied(node):
    with pytest.raises(SessionEnded):
        await node.fork("vm-none", [SandboxSpec("vm-x", 2, 512)])


async def test_a_copy_that_does_not_come_up_leaves_nothing_and_the_others_live(node, sandbox, monkeypatch):
    from instavm.node.vmm.qemu import QemuMachine

    load, calls = QemuMachine.load, []

    async def load_once(machine, **how):
        calls.append(machine)
        if len(calls) == 1:
            raise BootFailed("this one does not")
        await load(machine, **how)

    monkeypatch.setattr(QemuMachine, "load", load_once)
    specs = [SandboxSpec(f"vm-fork{next(NUMBERS)}", 2, 512) for _ in range(2)]
    results = await node.fork(sandbox.vm_id, specs)
    kinds = sorted(type(one).__name__ for one in results)
    assert kinds == ["BootFailed", "Started"]
    for one in results:
        if isinstance(one, Started):
            await node.stop(one.vm_id)
    assert (await sandbox.python("print(1)")).stdout == "1\n"
