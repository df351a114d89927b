"""`instavm isolation ID | key | verify`: what confines a sandbox, and whether a report of it can be believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from instavm.cli.options import ApiKey, BaseUrl, client
from instavm.client.isolation import verify as verified
from instavm.errors import HostNotReady, SignatureError
from instavm.settings import Settings


class _Shows(TyperGroup):
    """What is no command of this group is the id of a sandbox to show."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = not args or args[0] in self.commands or args[0].startswith("-")
        return super().parse_args(ctx, args if known else ["show", *args])


app = typer.Typer(no_args_is_help=True, cls=_Shows)


@app.command()
def show(
    vm_id: Annotated[str, typer.Argument(help="The sandbox, as `vm_id` in its session's record.")],
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Print the signed report of a running sandbox, as JSON."""
    with client(api_key, base_url, auto_start_session=False) as asked:
        print(json.dumps(asked.get_isolation(vm_id), indent=1))


@app.command()
def key() -> None:
    """Print the public key with which this host signs (PEM). Keep it where reports are checked."""
    try:
        from instavm.node.isolation import Signer  # noqa: PLC0415 (the server's libraries are an extra)
    except ModuleNotFoundError as exc:
        raise HostNotReady("this needs: pip install 'instavm-selfhosted[server]'") from exc
    state_dir = Settings().state_dir
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    print(Signer(state_dir).public_key, end="")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A report, as `show` prints it.")],
    key: Annotated[Path, typer.Option(help="The host's public key, as `instavm isolation key` prints it there.")],
) -> None:
    """Check a report without asking any server. Exit status 1 when it is not what that host signed."""
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as exc:
        raise SignatureError(f"{file}: {exc}") from exc
    try:
        public_key = key.read_text()
    except (OSError, ValueError) as exc:
        raise SignatureError(f"{key}: {exc}") from exc
    report = verified(document, public_key)
    print(f"signed by this host: {report.get('vm_id')} at {report.get('at')}, tier {report.get('tier')}")
    for weakness in report.get("weaker", []):
        print(f"  weaker: {weakness}")
