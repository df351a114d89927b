"""`instavm bench`: measure this machine, on a server of its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from instavm.errors import HostNotReady


class Subject(StrEnum):
    INTERACTIVE = "interactive"
    DENSITY = "density"
    BASELINE = "baseline"
    SIZES = "sizes"


SUBJECTS = """interactive: from nothing to the first result. density: many sandboxes at one time. baseline: the same beside a cold
boot, a plain restore and a bare python3. sizes: starts of all sizes of memory and vCPUs."""


def bench(
    what: Annotated[
        Subject,
        typer.Argument(help=SUBJECTS),
    ] = Subject.INTERACTIVE,
    *,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="How many sandboxes.")] = 20,
    cpu: Annotated[int, typer.Option(min=1, max=8, help="vCPUs of each.")] = 2,
    memory: Annotated[int, typer.Option(min=256, max=8192, help="Memory of each in MB.")] = 512,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the results in this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the times into this file, .png or .svg.")] = None,
) -> None:
    """Medians and percentiles with the machine's facts. Nothing else should run meanwhile."""
    from instavm.bench import baseline, density, host, interactive, report, sizes  # noqa: PLC0415 (the server's libraries are an extra)

    facts = {**report.machine(), "count": count, "vcpus": cpu, "sandbox_memory_mib": memory}
    with host.server(memory_overcommit=16) as settings:
        if what is Subject.DENSITY:
            results = density.measure(count, cpu, memory, settings)
        elif what is Subject.BASELINE:
            results = baseline.measure(count, cpu, memory, settings)
        elif what is Subject.SIZES:
            results = sizes.measure(count, cpu, memory)
        else:
            results = interactive.measure(count, cpu, memory)
    print(report.markdown(facts, results) if markdown else report.table(facts, results))
    if json_file is not None:
        report.save(json_file, facts, results)
    if plot is not None:
        try:
            report.plot(plot, facts, results)
        except ModuleNotFoundError as exc:
            raise HostNotReady(f"a plot needs {exc.name}: pip install 'instavm-selfhosted[bench]'") from None
