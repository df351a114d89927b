"""Run as root in a sandbox: takes its virtio devices away from the kernel and feeds them what no driver would.

`seed` may be set before. Tells its progress on the serial console, since the line to its agent is one of the devices.
"""

import ctypes
import mmap
import os
import random
import re
import signal
import struct
import time

seed = globals().get("seed", 0)
RINGS = 0xD0000
"""Reserved by the firmware's table, so that the kernel lets root write there; memory all the same, and so the devices can."""
PAGE = 0x1000
STATUS, NOTIFY, SELECT, NUM, READY = 0x70, 0x50, 0x30, 0x38, 0x44
DESC, AVAIL, USED, FEATURES, FEATURES_SELECT, CONFIG = 0x80, 0x90, 0xA0, 0x20, 0x24, 0x100

signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
ctypes.CDLL(None).mlockall(3)
choose = random.Random(seed)
os.mknod("/tmp/mem", 0o20600, os.makedev(1, 1))
os.mknod("/tmp/ttyS0", 0o20600, os.makedev(4, 64))
memory = os.open("/tmp/mem", os.O_RDWR | os.O_SYNC)
console = os.open("/tmp/ttyS0", os.O_WRONLY | os.O_NOCTTY)
rings = mmap.mmap(memory, 0x10000, offset=RINGS)
with open("/proc/iomem") as about:
    found = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ : (LNRO0005:\d+)", about.read(), re.MULTILINE)
unbind = os.open("/sys/bus/platform/drivers/virtio-mmio/unbind", os.O_WRONLY)
os.write(console, b"hostile: begins\n")
with open("/proc/sys/kernel/sched_rt_runtime_us", "w") as limit:
    limit.write("-1")
first, *others = sorted(os.sched_getaffinity(0))
waits, go = os.pipe()
os.set_inheritable(waits, True)
for cpu in others:
    if os.fork() == 0:
        os.sched_setaffinity(0, {cpu})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
        os.read(waits, 1)
        while True:
            pass
os.sched_setaffinity(0, {first})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
agents = [name for _, name in found if os.path.exists(f"/sys/bus/platform/devices/{name}/virtio2")]
for name in sorted((name for _, name in found), key=lambda name: name in agents):
    os.write(unbind, name.encode())
os.write(
    go, b"!" * len(others)
)  # from here on nothing else runs: not the agent, which has lost its line, and not its init
pages = {int(start, 16) & -PAGE: None for start, _ in found}
for page in pages:
    pages[page] = mmap.mmap(memory, PAGE, offset=page)
devices = [(pages[int(start, 16) & -PAGE], int(start, 16) % PAGE) for start, _ in found]
os.write(console, b"hostile: has %d devices\n" % len(devices))


def put(device, register, value):
    page, first = devices[device]
    page[first + register : first + register + 4] = struct.pack("<I", value & 0xFFFFFFFF)


def address():
    return choose.choice((RINGS, RINGS + choose.randrange(0x8000), 0, min(pages), 0xFFFFF000, 0x7FFFFFFF0000, 1 << 63))


def descriptor():
    length = choose.choice((0, 1, 16, 512, 4096, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
    return struct.pack("<QIHH", address(), length, choose.randrange(8), choose.choice((0, 1, 2, 255, 256, 0xFFFF)))


def request():
    """A disk's: its kind, among them SCSI commands and kinds that there are none of, and where on the disk."""
    return struct.pack("<IIQ", choose.choice((0, 1, 2, 3, 4, 8, 11, 13, 99)), 0, choose.choice((0, 1 << 40, 1 << 63)))


for number in range(400):
    device, queue = choose.randrange(len(devices)), choose.randrange(3)
    put(device, STATUS, 0)
    for status in (1, 3):
        put(device, STATUS, status)
    for half in (0, 1):
        put(device, FEATURES_SELECT, half)
        put(device, FEATURES, choose.choice((0, 1, 0xFFFFFFFF, choose.getrandbits(32))))
    put(device, STATUS, 11)
    put(device, SELECT, queue)
    put(device, NUM, choose.choice((0, 1, 3, 16, 256, 1024, 0xFFFF, 0xFFFFFFFF)))
    rings[0:0x1000] = b"".join(descriptor() for _ in range(256))
    rings[0x1000:0x1400] = struct.pack("<HH", 0, choose.choice((1, 2, 200, 0xFFFF))) + os.urandom(0x3FC)
    rings[0x2000:0x2400] = request() * 64
    for register, at in ((DESC, RINGS), (AVAIL, RINGS + 0x1000), (USED, RINGS + 0x2000)):
        place = at if choose.random() < 0.8 else address()
        put(device, register, place)
        put(device, register + 4, place >> 32)
    put(device, READY, 1)
    put(device, STATUS, 15)
    put(device, NOTIFY, queue)
    put(device, NUM, choose.choice((2, 0xFFFF)))  # its size, changed while it works
    put(device, NOTIFY, choose.choice((queue, 3, 0xFFFF)))
    put(device, CONFIG + 4 * choose.randrange(16), choose.getrandbits(32))
    if number % 50 == 0:
        os.write(console, b"hostile: %d\n" % number)
os.write(console, b"hostile: done\n")
time.sleep(600)
