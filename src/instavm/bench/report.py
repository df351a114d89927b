"""What every bench shares: the machine's facts, medians and percentiles, a table, JSON, Markdown and plots."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from instavm.version import __version__

Results = Mapping[str, Mapping[str, float]]
"""What was measured → its figures; the unit is the end of each figure's name."""

UNITS: Final = {"mib_per_s": "MiB/s", "ms": "ms", "mib": "MiB", "percent": "%", "s": "s", "times": "×"}


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
        "instavm": __version__,
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


def spread(values: Sequence[float], unit: str = "ms") -> dict[str, float]:
    """p50, p95, p99 and n of values in a unit of UNITS. p99 is there from 20 values on."""
    ordered = sorted(values)

    def percentile(percent: int) -> float:
        return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)

    found = {f"p50_{unit}": round(statistics.median(ordered), 2), f"p95_{unit}": percentile(95)}
    return {**found, **({f"p99_{unit}": percentile(99)} if len(ordered) >= 20 else {}), "n": len(ordered)}


def headline(facts: Mapping[str, Any]) -> str:
    note = f"; {facts['note']}" if "note" in facts else ""
    return f"{facts['cpu']}, {facts['cores']} cores, Linux {facts['kernel']}, {facts['at']}{note}"


def table(facts: Mapping[str, Any], results: Results) -> str:
    """For a terminal."""
    lines = [headline(facts)]
    for name, figures in results.items():
        lines.append(f"  {name:44} " + "   ".join(_figure(key, value) for key, value in figures.items()))
    return "\n".join(lines)


def markdown(facts: Mapping[str, Any], results: Results) -> str:
    """One row for each thing measured."""
    rows = [
        f"| {name.strip()} | {', '.join(' '.join(_figure(*one).split()) for one in figures.items())} |"
        for name, figures in results.items()
    ]
    return "\n".join([headline(facts), "", "| what | measured |", "| --- | --- |", *rows, ""])


def save(path: Path, facts: Mapping[str, Any], results: Results) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")


def finish(path: Path, facts: Mapping[str, Any], results: Results) -> None:
    """Print the table and keep the JSON."""
    print(table(facts, results))
    save(path, facts, results)


def plot(path: Path, facts: Mapping[str, Any], results: Results) -> None:
    """Medians with their 95th percentiles as bars, on a logarithmic axis; PNG or SVG by the name of the file.

    Raises ModuleNotFoundError: matplotlib is an extra.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    times = {name.strip(): figures for name, figures in results.items() if "p50_ms" in figures}
    figure = Figure(figsize=(9, 1 + 0.35 * len(times)), layout="constrained")
    axes = figure.add_subplot()
    medians = [figures["p50_ms"] for figures in times.values()]
    above = [figures["p95_ms"] - figures["p50_ms"] for figures in times.values()]
    axes.barh(list(times), medians, xerr=[[0.0] * len(above), above], color="#4878a8", ecolor="#333333", capsize=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("ms: median, and up to the 95th percentile")
    figure.suptitle(headline(facts), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _figure(key: str, value: float) -> str:
    unit = next((unit for unit in UNITS if key.endswith(f"_{unit}")), None)
    if unit is None:
        return f"{key} {value:g}"
    return f"{key.removesuffix(unit).rstrip('_')} {value:9.2f} {UNITS[unit]}".lstrip()
