"""`instavm template check`: does an image give its clones anything in common that they must not have?"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer

from instavm import limits
from instavm.cli.options import AsJson
from instavm.errors import HostNotReady
from instavm.settings import Settings

if TYPE_CHECKING:
    from instavm.node.clones import Finding

app = typer.Typer(no_args_is_help=True)


@app.callback()
def templates() -> None:
    """Templates: images booted once and saved; every sandbox is a clone of one."""


@app.command()
def check(
    image: Annotated[str, typer.Option(help="The image to look at.")] = "default",
    clones: Annotated[int, typer.Option(min=2, max=16, help="How many clones to compare.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Restore a template several times and compare the clones. Exit status 1 when they share what they must not."""
    try:
        from instavm.node.clones import compare  # noqa: F401, PLC0415 (the server's libraries are an extra)
    except ModuleNotFoundError as exc:
        raise HostNotReady("this needs: pip install 'instavm-selfhosted[server]'") from exc
    found = anyio.run(_look, image, clones)
    if as_json:
        print(json.dumps([{**asdict(one), "bad": one.bad} for one in found]))
    else:
        for one in found:
            print(f"{_word(one):8} {one.probe}" + (f": {one.accepted}" if one.shared and one.accepted else ""))
    raise typer.Exit(1 if any(one.bad for one in found) else 0)


def _word(finding: Finding) -> str:
    if not finding.there:
        return "absent"
    if finding.bad:
        return "SHARED"
    return "shared" if finding.shared else "differs"


async def _look(image: str, clones: int) -> list[Finding]:
    """On a node of its own, which is gone afterwards."""
    from instavm.contract.sandboxes import SandboxSpec  # noqa: PLC0415
    from instavm.node.clones import compare  # noqa: PLC0415
    from instavm.node.runtime import Runtime  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="ivm-check-") as place:
        settings = Settings().model_copy(update={"state_dir": Path(place) / "state", "spare_machines": 0})
        async with Runtime.open(settings) as node:
            names = [f"vm-check{number:05d}" for number in range(clones)]
            for name in names:
                await node.start(SandboxSpec(name, limits.VCPUS_DEFAULT, limits.MEMORY_MIB_DEFAULT, image=image))
            return await compare([partial(node.execute, name) for name in names])
