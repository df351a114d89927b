"""`instavm bench`: measure this machine, on a server of its own."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from instavm.errors import HostNotReady, InvalidInput

if TYPE_CHECKING:
    from instavm.bench.report import Results


class Subject(StrEnum):
    INTERACTIVE = "interactive"
    START = "start"
    EXECUTE = "execute"
    FILES = "files"
    SNAPSHOTS = "snapshots"
    DENSITY = "density"
    BASELINE = "baseline"
    DRIVERS = "drivers"
    SIZES = "sizes"
    EGRESS = "egress"


SUBJECTS = """interactive: from nothing to the first result. start: its steps, with and without machines made ahead.
execute: round trips and streamed output. files: up and down. snapshots: suspend, resume, fork, snapshot.
density: many sandboxes at one time. baseline: the same beside a cold boot, a plain restore and a bare python3.
drivers: the VMMs of this host. sizes: starts of all sizes of memory and vCPUs. egress: the way through the filter."""


def bench(
    what: Annotated[
        Subject,
        typer.Argument(help=SUBJECTS),
    ] = Subject.INTERACTIVE,
    *,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="How many sandboxes, calls or rounds.")] = 20,
    cpu: Annotated[int, typer.Option(min=1, max=8, help="vCPUs of each.")] = 2,
    memory: Annotated[int, typer.Option(min=256, max=8192, help="Memory of each in MB.")] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the results in this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this file, .png or .svg.")] = None,
) -> None:
    """Medians and percentiles with the machine's facts. Nothing else should run meanwhile."""
    from instavm.bench import report  # noqa: PLC0415 (the server's libraries are an extra)

    _can_be_kept("json", json_file)
    _can_be_kept("plot", plot)
    if plot is not None:
        _can_be_drawn(plot)
    facts = {**report.machine(), "count": count, "vcpus": cpu, "sandbox_memory_mib": memory}
    results = _measures()[what](count, cpu, memory)
    print(report.markdown(facts, results) if markdown else report.table(facts, results))
    if json_file is not None:
        report.save(json_file, facts, results)
    if plot is not None:
        report.plot(plot, facts, results)


def _can_be_kept(option: str, file: Path | None) -> None:
    """Before minutes are spent on what goes there. Raises InvalidInput."""
    if file is not None and file.is_dir():
        raise InvalidInput(option, str(file), "a file, not a folder")


def _can_be_drawn(file: Path) -> None:
    """Raises InvalidInput, HostNotReady."""
    if file.suffix not in (".png", ".svg"):
        raise InvalidInput("plot", str(file), "a name that ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise HostNotReady("a plot needs matplotlib: pip install 'instavm-selfhosted[bench]'")


def _measures() -> dict[Subject, Callable[[int, int, int], Results]]:
    """How each is measured: with so many rounds, on sandboxes of so many vCPUs and so much memory in MB."""
    from instavm.bench import (  # noqa: PLC0415 (as above)
        baseline,
        density,
        drivers,
        egress,
        execute,
        files,
        interactive,
        sizes,
        snapshots,
        start,
    )

    return {
        Subject.INTERACTIVE: interactive.measure,
        Subject.START: start.measure,
        Subject.EXECUTE: execute.measure,
        Subject.FILES: files.measure,
        Subject.SNAPSHOTS: snapshots.measure,
        Subject.DENSITY: density.measure,
        Subject.BASELINE: baseline.measure,
        Subject.DRIVERS: drivers.measure,
        Subject.SIZES: sizes.measure,
        Subject.EGRESS: lambda count, _vcpus, _memory: egress.measure(count),
    }
