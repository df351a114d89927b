"""Nothing is left behind: after every test (see conftest), and after a hundred sandboxes in a row."""

import os
import threading
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.anyio


def held():
    """All that a node could forget to give back, besides machines and their folders."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(psutil.Process().children(recursive=True)),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "namespaces": len(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else 0,
        "interfaces": len(os.listdir("/sys/class/net")),
        "temporary files": sum("ivm" in name or "instavm" in name for name in os.listdir("/tmp")),
    }


async def test_a_hundred_sandboxes_in_a_row_leave_nothing(start, node):
    for _ in range(3):
        await (await start()).stop()
    before = None
    for number in range(100):
        sandbox = await start()
        assert (await sandbox.python("print(1)")).stdout == "1\n"
        await sandbox.stop()
        if number == 4:
            before = held()
    after = held()
    spare = node._settings.spare_machines  # one may be in the making at one of the two looks
    slack = {"descriptors": 12 * spare, "children": spare, "threads": 2, "mounts": 0}
    for name, count in after.items():
        assert count <= before[name] + slack.get(name, 0), f"{name}: {before[name]} → {count}"
