"""What every bench shares: the machine's facts, medians and p95, a table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a reader must know of the machine to make sense of a number."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "?")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "python_loop_ms": round(_python_loop_ms(), 1),
        "load_before": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _python_loop_ms() -> float:
    """A million turns of an empty loop, best of three: how fast this machine is, in a unit of its own."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(1_000_000):
            pass
        times.append((time.perf_counter() - began) * 1000)
    return min(times)


def spread(times_ms: list[float]) -> dict[str, float]:
    """p50, p95 and n of times in milliseconds."""
    ordered = sorted(times_ms)
    return {
        "p50_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)], 2),
        "n": len(ordered),
    }


def write(name: str, facts: dict[str, Any], results: dict[str, dict[str, float]], into: Path | None = None) -> Path:
    """Print the table and keep it as JSON; the file's path."""
    print(f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, {facts['at']}")
    for line, result in results.items():
        print(f"  {line:44} p50 {result['p50_ms']:9.2f} ms   p95 {result['p95_ms']:9.2f} ms   n {result['n']:g}")
    path = into or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    return path
