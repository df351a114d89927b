"""The jail's control groups on a kernel that has version 2 alone, as most hosts do: a sandbox is such a machine.

What runs there is the module that the server runs on its host, not the VMM: its limits are set, read, and hold.
"""

import json
from pathlib import Path

import pytest

from instavm import errors
from instavm.node.jail import cgroups

pytestmark = pytest.mark.anyio

ON_THE_HOST = """
import json, os, subprocess, sys
from pathlib import Path
sys.path.insert(0, "/app/host")
from instavm.node.jail.cgroups import Cgroups, Limits, hierarchies

(tree,) = hierarchies()
groups = Cgroups(Path("/app"))
told = {"version": tree.version, "controllers": tree.controllers}
groups.open()

def within(machine, code):
    "Run code in that machine's group; how it ended, and what it said."
    put = f"import sys; sys.stdin.readline(); exec({code!r})"
    one = subprocess.Popen([sys.executable, "-c", put], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    groups.put(machine, one.pid)
    said, _ = one.communicate("go")
    return one.returncode, said

def group(machine):
    return Path(groups.paths(machine)["cpu"])

groups.make("m1", Limits(1, 0, 5 << 20, 700))  # a CPU and a half, 256 MiB
told["set"] = groups.read("m1")
told["vcpus"] = groups.vcpus("m1")
told["computed"] = within("m1", "n = sum(range(10**6))")[0]
told["cpu"] = (group("m1") / "cpu.stat").read_text()
told["forks"] = within("m1", '''
import os, signal
os.setsid()
n = 0
try:
    while n < 400:
        if os.fork() == 0:
            signal.pause()
        n += 1
except OSError:
    pass
print(n, flush=True)
os.killpg(0, signal.SIGKILL)
''')
told["over_before"] = groups.over_memory("m1")
told["hog"] = within("m1", "x = bytearray(320 << 20)")[0]
told["over_after"] = groups.over_memory("m1")
groups.idle("m1", True, 2)
told["idle"] = (group("m1") / "cpu.idle").read_text().strip()
groups.idle("m1", False, 2)
told["weight"] = (group("m1") / "cpu.weight").read_text().strip()
groups.make("m2", Limits(2, 512, 5 << 20, 700))
sleeper = subprocess.Popen(["sleep", "1000"])
groups.put("m2", sleeper.pid)
told["machines"] = sorted(groups.machines())
groups.end("m2")
told["ended"] = sleeper.wait()
for machine in ("m1", "m2", "m2"):
    groups.remove(machine)
groups.close()
told["left"] = [name for name in os.listdir(tree.mount) if name.startswith("instavm")]
print(json.dumps(told))
"""


async def pieces(data):
    yield data


async def test_limits_are_set_and_hold(sandbox, node):
    for module in (errors, cgroups):
        place = "/app/host/" + module.__name__.replace(".", "/") + ".py"
        await node.put_file(sandbox.vm_id, place, "module.py", pieces(Path(module.__file__).read_bytes()))
    await node.put_file(sandbox.vm_id, "/app/on_the_host.py", "on_the_host.py", pieces(ON_THE_HOST.encode()))
    ran = await sandbox.bash(
        "mkdir /tmp/groups && mount -t cgroup2 none /tmp/groups && umount -l /sys/fs/cgroup 2>/dev/null; "
        "python3 /app/on_the_host.py"
    )
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["version"], set(told["controllers"])) == (2, {"cpu", "memory", "pids", "io"})
    assert told["set"]["cpu.max"] == "150000 100000" and told["vcpus"] == 1
    assert told["set"]["memory.max"] == str(256 << 20) and told["set"]["memory.oom.group"] == "1"
    assert told["set"]["pids.max"] == str(cgroups.TASKS)
    assert "rbps=5242880 wbps=5242880 riops=700 wiops=700" in told["set"]["io.max"]
    assert told["computed"] == 0
    assert int(dict(line.split() for line in told["cpu"].splitlines())["nr_periods"]) > 0, "its share is counted"
    assert told["forks"][1] == f"{cgroups.TASKS - 1}\n", "so many besides itself"
    assert (told["over_before"], told["hog"], told["over_after"]) == (False, -9, True)
    assert (told["idle"], told["weight"]) == ("1", "200")
    assert told["machines"] == ["m1", "m2"] and told["ended"] == -9
    assert told["left"] == []
