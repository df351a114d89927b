"""Guest memory that many map and nobody can change."""

import mmap
import os

import pytest

from instavm.node.vmm import memory
from instavm.node.vmm.memory import Memories, sealed


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "memory"
    with file.open("wb") as out:
        out.write(b"first")
        out.seek(8 << 20)
        out.write(b"last")
        out.truncate(16 << 20)
    return file


@pytest.fixture
def memories():
    memories = Memories()
    yield memories
    memories.close()


def test_a_copy_is_the_same_and_as_sparse(file):
    fd = sealed(file)
    assert os.pread(fd, 16 << 20, 0) == file.read_bytes()
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)


def test_nobody_writes_to_it_not_even_its_owner(file):
    fd = os.open(f"/proc/self/fd/{sealed(file)}", os.O_RDWR)
    for attempt in (
        lambda: os.pwrite(fd, b"x", 0),
        lambda: os.ftruncate(fd, 0),
        lambda: os.posix_fallocate(fd, 0, 32 << 20),
        lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    ):
        with pytest.raises(OSError, match="not permitted"):
            attempt()
    own = mmap.mmap(fd, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    own[:5] = b"other"
    assert os.pread(fd, 5, 0) == b"first"
    own.close()
    os.close(fd)


def test_all_who_ask_for_one_file_share_one_copy(file, memories):
    one, other = memories.get(file), memories.get(file)
    assert os.fstat(one).st_ino == os.fstat(other).st_ino
    os.close(one)
    os.close(other)


def test_a_copy_that_has_grown_is_replaced(file, memories, monkeypatch):
    """Touching pages that were never written fills them in; what is full of them is not handed out again."""
    monkeypatch.setattr(memory, "GROWN_MAX", 1 << 20)
    one = memories.get(file)
    touched = mmap.mmap(one, 16 << 20, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    for at in range(0, 4 << 20, 4096):
        touched[at] = 1
    other = memories.get(file)
    assert os.fstat(one).st_ino != os.fstat(other).st_ino
    touched.close()
    os.close(one)
    os.close(other)


def test_only_so_many_are_kept(file, memories, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(memory.KEPT + 3):
        path = tmp_path / str(number)
        path.write_bytes(b"x")
        os.close(memories.get(path))
    assert len(os.listdir("/proc/self/fd")) - before == memory.KEPT
