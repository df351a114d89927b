"""Nothing is left behind: after every test (see conftest), and after a hundred sandboxes in a row."""

import os
import threading
from pathlib import Path

import anyio
import psutil
import pytest

pytestmark = pytest.mark.anyio


def held():
    """All that a node could forget to give back, besides machines and their folders."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(psutil.Process().children(recursive=True)),
    }


def named():
    """The same, of what has a name on this host: namespaces, interfaces, temporary files; but for what tests make themselves.

    And mounts, each by its number and place.
    """
    folders = [folder for folder in ("/run/netns", "/sys/class/net", "/tmp") if os.path.isdir(folder)]
    names = {
        f"{folder}/{name}" for folder in folders for name in os.listdir(folder) if "ivm" in name or "instavm" in name
    }
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    mounts = {f"mount {line[0]} on {line[4]}" for line in lines}
    return mounts | {name for name in names if not os.path.basename(name).startswith("ivmt")}


async def test_a_hundred_sandboxes_in_a_row_leave_nothing(start, node, quiet):
    for _ in range(3):
        await (await start()).stop()
    before = None
    for number in range(100):
        sandbox = await start()
        assert (await sandbox.python("print(1)")).stdout == "1\n"
        await sandbox.stop()
        if number == 4:
            await quiet()
            before, names = held(), named()
    await quiet()
    after = held()
    spare = node._settings.spare_machines
    slack = {"descriptors": 12 * spare, "children": spare, "threads": 2}
    for name, count in after.items():
        assert count <= before[name] + slack.get(name, 0), f"{name}: {before[name]} → {count}"
    with anyio.fail_after(60):
        while named() - names:
            await anyio.sleep(0.1)  # tests beside this one make some too, and take them away again
