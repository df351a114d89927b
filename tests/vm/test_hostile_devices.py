"""Root in a guest takes its own devices apart: the node notices, ends that sandbox, and no other."""

from pathlib import Path

import anyio
import pytest

from instavm.contract.sandboxes import EndReason
from instavm.errors import OutcomeUnknown

pytestmark = pytest.mark.anyio
HOSTILE = (Path(__file__).parents[1] / "driver" / "hostile_guest.py").read_text()
NOTICED_S = 2.0
SG_IO = """
import array, ctypes, fcntl, os
os.mknod('/tmp/vdb', 0o60600, os.stat('/').st_dev)
disk = os.open('/tmp/vdb', os.O_RDWR)
buffer = ctypes.create_string_buffer(4096)
refused = 0
for command in (b'\\x12\\0\\0\\0\\x60\\0', b'\\x28' + bytes(9), b'\\x2a' + bytes(9), bytes(16), b'\\xff' * 16):
    sense, given = ctypes.create_string_buffer(64), ctypes.create_string_buffer(command)
    header = array.array('B', bytes(88))
    for at, value, size in ((0, ord('S'), 4), (4, -3 % (1 << 32), 4), (8, len(command), 1), (9, 64, 1), (12, 4096, 4),
                            (16, ctypes.addressof(buffer), 8), (24, ctypes.addressof(given), 8),
                            (32, ctypes.addressof(sense), 8), (40, 5000, 4)):
        header[at : at + size] = array.array('B', value.to_bytes(size, 'little'))
    try:
        fcntl.ioctl(disk, 0x2285, header)
    except OSError:
        refused += 1
print(refused)
"""


async def test_a_guest_that_attacks_its_devices_is_noticed_and_ended_alone(node, start):
    hostile, neighbour = await start(), await start()
    node.ended.clear()
    with anyio.fail_after(60), pytest.raises(OutcomeUnknown):
        await hostile.python(HOSTILE)
    with anyio.fail_after(NOTICED_S):
        while not node.ended:
            await anyio.sleep(0.02)
    assert [(end.vm_id, end.reason) for end in node.ended] == [(hostile.vm_id, EndReason.CRASHED)]
    assert (await neighbour.python("print(6 * 7)")).stdout == "42\n"


async def test_a_disk_takes_no_scsi_commands(sandbox):
    assert (await sandbox.python(SG_IO)).stdout == "5\n"
    assert (await sandbox.bash("sync && echo well > /app/x && cat /app/x")).stdout == "well\n"
