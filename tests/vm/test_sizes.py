"""Every size that may be asked for is really there inside."""

import pytest

from instavm.errors import NoCapacity

pytestmark = pytest.mark.anyio

SIZES = [(1, 512), (3, 300), (8, 1024), (2, 256), (2, 8192)]


@pytest.mark.parametrize(("vcpus", "memory_mib"), SIZES)
async def test_cpu_count_and_memory_agree_with_what_was_asked(start, vcpus, memory_mib):
    """The kernel keeps a part of the memory to itself; what is left is at least 80 % and never more than was asked."""
    sandbox = await start(vcpus, memory_mib)
    assert (await sandbox.python("import multiprocessing; print(multiprocessing.cpu_count())")).stdout == f"{vcpus}\n"
    total = int((await sandbox.bash("awk '/MemTotal/ {print $2}' /proc/meminfo")).stdout) / 1024
    assert 0.8 * memory_mib <= total <= memory_mib


async def test_a_size_asked_for_again_finds_its_template(start):
    await start(1, 512)
    assert (await start(1, 512)).started.cold is False


async def test_more_memory_than_the_host_has_is_refused(start, monkeypatch):
    monkeypatch.setattr("instavm.node.memory.total_mib", lambda: 4096)
    with pytest.raises(NoCapacity, match="8192 asked for, this host has 4096"):
        await start(1, 8192)
