"""A quiet sandbox beside four noisy ones: how much longer does its every call take?

    python bench/neighbours.py [--calls 200] [--json FILE]

Noisy are: one that computes on all its vCPUs, one that writes through all its memory, one that writes to its disk and flushes,
one that sends packets as fast as it can (they are refused: it may reach nothing), each from before the measurement until after
it. The quiet one does something small, thinks for a moment, and does it again, as it did in the baseline.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

from instavm import InstaVM
from instavm.bench import report
from instavm.bench.host import KEY, SETTLED_S, server

NOISE = {
    "computes": "sh -c 'while :; do :; done' & while :; do :; done",
    "writes through its memory": (
        "python3 -c 'b = bytearray(300 << 20)\nwhile True:\n for at in range(0, len(b), 4096): b[at] ^= 1'"
    ),
    "writes to its disk": "while :; do dd if=/dev/zero of=/app/noise bs=1M count=64 conv=fsync 2>/dev/null; done",
    "sends packets": (
        "python3 -c 'import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\ndata = bytes(1400)\n"
        'while True:\n try: s.sendto(data, ("192.0.2.1", 9))\n except OSError: pass\''
    ),
}
QUIET = "sum(range(2000))"
BEGUN_S = 3.0
THINKS_S = 0.1
"""Without it, on the emulated tier, it would take as much of the CPU as the noisy ones, and be one of them."""


def calls(vm: InstaVM, count: int) -> list[float]:
    times = []
    for number in range(count + 10):
        time.sleep(THINKS_S)
        began = time.perf_counter()
        vm.execute(QUIET)
        if number >= 10:
            times.append((time.perf_counter() - began) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("results") / "neighbours.json")
    asked = parser.parse_args()
    facts = report.machine()
    results: dict[str, dict[str, float]] = {}
    with server(), InstaVM(KEY) as quiet, ExitStack() as noisy:
        quiet.execute(QUIET)
        time.sleep(SETTLED_S)
        results["alone"] = report.spread(calls(quiet, asked.calls))
        for noise in NOISE.values():
            noisy.enter_context(InstaVM(KEY, timeout=1200)).execute_async(noise, language="bash")
        time.sleep(BEGUN_S)
        results["beside four noisy ones"] = report.spread(calls(quiet, asked.calls))
    report.finish(asked.json, facts, results)
    factor = results["beside four noisy ones"]["p95_ms"] / results["alone"]["p95_ms"]
    print(f"p95 beside noise is {factor:.2f} times what it is alone")


if __name__ == "__main__":
    main()
