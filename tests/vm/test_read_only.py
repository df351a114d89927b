"""Root in a guest against everything called read-only: it is so by the host's doing, and nothing in a guest decides it."""

import hashlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.anyio

SYSTEM_DISK = r"""
import ctypes, errno, fcntl, json, mmap, os, subprocess

libc = ctypes.CDLL(None, use_errno=True)
BLKROSET, BLKDISCARD, BLKZEROOUT, LOOP_SET_FD, LOOP_CTL_GET_FREE = 0x125D, 0x1277, 0x127F, 0x4C00, 0x4C82
got = {}

def attempt(function):
    try:
        got[function.__name__] = function()
    except OSError as exc:
        got[function.__name__] = None

def node(name):
    path = f"/tmp/{name}"
    major, minor = open(f"/sys/block/{name}/dev").read().split(":")
    if not os.path.exists(path):
        os.mknod(path, 0o60600, os.makedev(int(major), int(minor)))
    return path

def changed(path):
    with open(path, "rb") as file:
        return "changed" if file.read(4096) != before else None

disk = node("vda")
with open(disk, "rb") as file:
    before = file.read(4096)

@attempt
def plain_write():
    fd = os.open(disk, os.O_RDWR)
    os.write(fd, b"x" * 4096)
    os.fsync(fd)
    return changed(disk)

@attempt
def declared_writable_first():
    fd = os.open(disk, os.O_RDONLY)
    fcntl.ioctl(fd, BLKROSET, (0).to_bytes(4, "little"))
    fd = os.open(disk, os.O_RDWR)
    os.write(fd, b"x" * 4096)
    os.fsync(fd)
    return changed(disk)

@attempt
def past_the_page_cache():
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)
    page.write(b"x" * 4096)
    os.pwritev(fd, [page], 0)
    return changed(disk)

@attempt
def through_a_mapping():
    fd = os.open(disk, os.O_RDWR)
    page = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    page[:] = b"x" * 4096
    page.flush()
    return changed(disk)

@attempt
def discarded():
    fcntl.ioctl(os.open(disk, os.O_RDWR), BLKDISCARD, (0).to_bytes(8, "little") + (1 << 20).to_bytes(8, "little"))
    return changed(disk)

@attempt
def zeroed():
    fcntl.ioctl(os.open(disk, os.O_RDWR), BLKZEROOUT, (0).to_bytes(8, "little") + (1 << 20).to_bytes(8, "little"))
    return changed(disk)

@attempt
def through_a_loop_device():
    os.mknod("/tmp/loop-control", 0o20600, os.makedev(10, 237))
    number = fcntl.ioctl(os.open("/tmp/loop-control", os.O_RDWR), LOOP_CTL_GET_FREE)
    os.mknod("/tmp/loop", 0o60600, os.makedev(7, number))
    loop = os.open("/tmp/loop", os.O_RDWR)
    fcntl.ioctl(loop, LOOP_SET_FD, os.open(disk, os.O_RDWR))
    os.write(loop, b"x" * 4096)
    os.fsync(loop)
    return changed(disk)

@attempt
def mounted_and_remounted():
    os.makedirs("/tmp/system", exist_ok=True)
    for flags in (1, 0x20, 0x21):
        libc.mount(b"/tmp/vda", b"/tmp/system", b"squashfs", flags, None)
    libc.mount(b"none", b"/tmp/system", None, 0x20, None)
    subprocess.run(["mount", "-o", "remount,rw", "/tmp/system"], capture_output=True)
    with open("/tmp/system/usr/lib/python3.11/instavm_guest/agent.py", "a") as file:
        file.write("evil = True\n")
    return "written"

@attempt
def with_debugfs():
    done = subprocess.run(["debugfs", "-w", "-R", "mkdir evil", disk], capture_output=True, text=True)
    return changed(disk)

@attempt
def as_another_file_system():
    done = subprocess.run(["mke2fs", "-q", "-F", disk], capture_output=True, text=True)
    return "made" if done.returncode == 0 else changed(disk)

print(json.dumps(got))
"""
OWN_NAMES = """
for file in hostname hosts machine-id; do
    echo evil > /etc/$file; mount -o remount,rw /etc/$file 2>/dev/null; umount /etc/$file; echo evil > /etc/$file
done
echo evil > /usr/bin/python3.11.new; cp /usr/bin/env /usr/bin/true; rm -rf /usr/share/doc
mount -o remount,rw / ; echo evil > /sys/kernel/evil
sync
"""


def shared_files(node, sandbox):
    """What sandboxes have in common on the host, with all that could tell a change of it."""
    template = node._templates._verified[sandbox.node._live[sandbox.vm_id].prepared.template]
    files = (template.saved.spec.system, template.saved.memory, template.saved.state, *template.saved.layers)
    return {path: (path.stat().st_mtime_ns, path.stat().st_size, path.stat().st_blocks, end_of(path)) for path in files}


def end_of(path: Path):
    with path.open("rb") as file:
        return hashlib.sha256(file.read(64 << 20)).hexdigest()


async def test_the_system_image_can_not_be_written(node, start):
    hostile = await start()
    before = shared_files(node, hostile)
    told = await hostile.python(SYSTEM_DISK, timeout_s=120)
    got = json.loads(told.stdout)
    assert len(got) == 10, told
    assert {name: what for name, what in got.items() if what} == {}
    assert shared_files(node, hostile) == before
    assert (await (await start()).python("print(6 * 7)")).stdout == "42\n"


async def test_what_a_guest_does_to_its_own_files_no_other_sees(node, start):
    """Those bound over /etc, the image's own programs, the root file system: its copies, all of them."""
    hostile, neighbour = await start(), await start()
    before = shared_files(node, hostile)
    await hostile.bash(OWN_NAMES)
    look = "cat /etc/hostname /etc/machine-id /etc/hosts; ls /usr/bin/python3.11.new /sys/kernel/evil; ls -d /usr/share/doc"
    later = await start()
    for clone in (neighbour, later):
        said = (await clone.bash(look)).stdout.splitlines()
        assert said[0] == clone.vm_id and said[-1] == "/usr/share/doc"
        assert "evil" not in "\n".join(said)
    assert shared_files(node, hostile) == before
