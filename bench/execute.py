"""How fast answers come: round trips, the first byte of streamed output, and 100 MB of it with the memory that the host needs.

    python bench/execute.py [--count 100] [--json FILE]

Through the whole stack, on one sandbox of 2 vCPUs and 512 MB. "Streamed": the guest prints its clock, which is compared with
the host's when the event is read. By how much the two differ is taken from the fastest of many round trips; half of that
round trip is the error.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, server
from instavm.settings import Settings

MEGABYTES = 100
CELLS = (
    ("python", "print(1)"),
    ("python", "1 + 1"),
    ("python", "1 / 0"),
    ("python", "%who_ls"),
    ("python", "await asyncio.sleep(0)"),
    ("javascript", "1 + 1"),
    ("bash", "echo 1"),
)


def round_trips(vm: InstaVM, count: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = defaultdict(list)
    vm.execute("import asyncio")
    for language, code in CELLS:
        for number in range(count + 10):
            began = time.perf_counter()
            vm.execute(code, language=language)
            if number >= 10:
                times[f"round trip: {language}, {code}"].append((time.perf_counter() - began) * 1000)
    return times


def first_bytes(vm: InstaVM, count: int) -> dict[str, list[float]]:
    """Milliseconds from the guest's print to our event, for a line and for text without a newline."""
    times: dict[str, list[float]] = defaultdict(list)
    behind_s = clock_difference_s(vm)
    for name, end in (("a line", "'\\n'"), ("no newline", "' '")):
        code = f"import time\nfor _ in range({count}):\n    time.sleep(0.05)\n    print(time.time(), end={end})"
        for event in vm.stream(code):
            if event.type == "stdout":
                took_s = time.time() - float(event.text.split()[0]) - behind_s
                times[f"streamed: print of {name} to event"].append(took_s * 1000)
    return times


def clock_difference_s(vm: InstaVM) -> float:
    """How far the guest's clock is behind ours."""
    found = []
    for _ in range(50):
        began = time.time()
        guest = float(vm.execute("import time; print(time.time())").stdout)
        ended = time.time()
        found.append((ended - began, (began + ended) / 2 - guest))
    return min(found)[1]


def flood(vm: InstaVM) -> dict[str, list[float]]:
    """100 MB without a newline: how long, and by how much the server grows at its peak."""
    code = f"import os\nfor _ in range({MEGABYTES}): os.write(1, b'x' * 1_000_000);"
    began = time.perf_counter()
    with peak_mib() as grown:
        result = vm.execute(code)
    assert result.truncated
    took = (time.perf_counter() - began) * 1000
    return {f"{MEGABYTES} MB of stdout": [took], f"{MEGABYTES} MB of stdout: server grows by MiB": grown}


@contextmanager
def peak_mib() -> Iterator[list[float]]:
    """By how many MiB the resident memory of the embedded server rises at most within the block."""
    pid = int((Settings().server_lock).read_text())
    refs = Path(f"/proc/{pid}/clear_refs")
    refs.write_text("5")
    before = psutil.Process(pid).memory_info().rss
    grown: list[float] = []
    yield grown
    status = Path(f"/proc/{pid}/status").read_text()
    high = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    grown.append((high - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "execute.json")
    asked = parser.parse_args()
    facts = report.machine()
    times: dict[str, list[float]] = {}
    with server(), InstaVM(KEY, timeout=3600) as vm:
        times |= round_trips(vm, asked.count)
        times |= first_bytes(vm, asked.count)
        times |= flood(vm)
    report.finish(asked.json, facts, {name: report.spread(of) for name, of in times.items()})


if __name__ == "__main__":
    main()
