"""A guest that prints without end costs the server a small multiple of what a result may keep."""

from pathlib import Path

import psutil
import pytest

from instavm import limits

FLOOD = "import os\nos.write(1, b'head')\nfor _ in range(100): os.write(1, %s)\nos.write(1, b'tail');"


def grown_bytes(pid, work):
    """By how much the resident memory of a server's two processes rises at most while `work` runs, and what that gives."""
    below = psutil.Process(pid).children(recursive=True)
    both = [psutil.Process(pid), *(one for one in below if "--control" in one.cmdline() and one.name() != "bwrap")]
    assert len(both) == 2
    for one in both:
        Path(f"/proc/{one.pid}/clear_refs").write_text("5")
    before = sum(one.memory_info().rss for one in both)
    result = work()
    return sum(peak(one.pid) for one in both) - before, result


def peak(pid):
    high = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(high.split()[1]) << 10


@pytest.mark.parametrize(
    ("megabyte", "times"),
    [("b'x' * 1_000_000", 10), ("b'x' * 999_996 + '😀'.encode()", 16)],
)
def test_a_hundred_megabytes_in_bounded_memory(module_servers, megabyte, times):
    """Text takes 1 to 4 bytes a character, by the widest one in it; as bytes, as text and as JSON, in two processes."""
    with module_servers.client() as vm:
        vm.execute("1")
        grown, result = grown_bytes(module_servers.process.pid, lambda: vm.execute(FLOOD % megabyte, timeout=200))
        print(f"grew by {grown >> 20} MiB")
        assert result.truncated and result.stdout.startswith("head") and result.stdout.endswith("tail")
        assert len(result.stdout.encode()) > limits.OUTPUT_BYTES - 100
        assert grown < times * limits.OUTPUT_BYTES


def test_following_a_hundred_megabytes_in_bounded_memory(module_servers):
    with module_servers.client() as vm:
        vm.execute("1")

        def follow():
            *_, last = vm.stream(FLOOD % "b'x' * 1_000_000", timeout=200)
            return last.result

        grown, result = grown_bytes(module_servers.process.pid, follow)
        print(f"grew by {grown >> 20} MiB")
        assert result.stdout.endswith("tail")
        assert grown < 8 * limits.OUTPUT_BYTES
