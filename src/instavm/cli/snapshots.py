"""`instavm snapshot ls | get | rm | build | create | gc`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from instavm.cli.options import ApiKey, AsJson, BaseUrl, client, environment
from instavm.cli.signals import Ended, held
from instavm.client.sync import InstaVM
from instavm.errors import SnapshotError

POLL_S: Final = 0.5

app = typer.Typer(no_args_is_help=True)
Id = Annotated[str, typer.Argument(help="As shown by `instavm snapshot ls`.")]


def _client(api_key: str | None, base_url: str | None) -> InstaVM:
    return client(api_key, base_url, auto_start_session=False)


def _print(record: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(record) if as_json else text)


@app.command(name="ls")
def list_(
    kind: Annotated[str | None, typer.Option("--type", help="user or system; else both.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """List snapshots, newest first. Of a size, what is shared belongs to others too."""
    rows = _client(api_key, base_url).snapshots.list(kind)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("id", "name", "status", "own", "shared", "made of", "created")
    for row in rows:
        own = row["size_bytes"] - row["shared_bytes"]
        made_of = row["oci_image"] or row["vm_id"] or ""
        cells = (
            row["name"] or "",
            row["status"],
            _mib(own),
            _mib(row["shared_bytes"]),
            made_of,
            row["created_at"][:19],
        )
        table.add_row(row["id"], *cells)
    Console().print(table)


@app.command()
def get(snapshot: Id, as_json: AsJson = False, api_key: ApiKey = None, base_url: BaseUrl = None) -> None:
    """Show all that is known of a snapshot."""
    row = _client(api_key, base_url).snapshots.get(snapshot)
    _print(row, as_json, "\n".join(f"{name}: {value}" for name, value in row.items() if value not in (None, {}, "")))


@app.command()
def rm(snapshots: list[str], as_json: AsJson = False, api_key: ApiKey = None, base_url: BaseUrl = None) -> None:
    """Remove snapshots; what runs from them runs on. A build that is under way is ended."""
    vm = _client(api_key, base_url)
    for snapshot in snapshots:
        _print(vm.snapshots.delete(snapshot), as_json, f"removed {snapshot}")


@app.command()
def create(
    vm_id: Annotated[str, typer.Argument(help="The VM whose disk it is to be; it goes on.")],
    name: Annotated[str | None, typer.Option(help="To find it again.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Take a snapshot of a running VM's disk."""
    row = _client(api_key, base_url).vms.snapshot(vm_id, name=name)
    _print(row, as_json, row["id"])


@app.command()
def build(
    image: Annotated[
        str, typer.Argument(help="python:3.12-slim, host:port/name@sha256:…, oci:/path:tag, docker-archive:/path")
    ],
    name: Annotated[str | None, typer.Option(help="To find it again.")] = None,
    apt: Annotated[str | None, typer.Option(help="Packages, separated by spaces.")] = None,
    pip: Annotated[str | None, typer.Option(help="Packages, separated by spaces.")] = None,
    npm: Annotated[str | None, typer.Option(help="Packages, separated by spaces.")] = None,
    git: Annotated[str | None, typer.Option(help="A repository to clone to /app/repo.")] = None,
    branch: Annotated[str | None, typer.Option(help="Of that repository.")] = None,
    run: Annotated[str | None, typer.Option(help="A shell command, after everything else.")] = None,
    disk: Annotated[int | None, typer.Option(min=1, max=16, help="Size of the disk in GB.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="May be repeated.")] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="What the build may reach besides package registries. May be repeated.")
    ] = None,
    cidr: Annotated[list[str] | None, typer.Option(help="The same, an address range. May be repeated.")] = None,
    cpu: Annotated[int | None, typer.Option(help="vCPUs of the sandbox that builds it.")] = None,
    memory: Annotated[int | None, typer.Option(help="Its memory in MB.")] = None,
    username: Annotated[str | None, typer.Option(help="For the registry.")] = None,
    password_file: Annotated[Path | None, typer.Option(help="A file with the password for the registry.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Build a snapshot from an OCI image and follow it to its end. Ctrl-C, or another signal to end, cancels the build."""
    args = {
        "extra_apt_packages": apt,
        "extra_pip_packages": pip,
        "extra_npm_packages": npm,
        "git_clone_url": git,
        "git_clone_branch": branch,
        "post_build_cmd": run,
        "disk_size_gb": disk,
        "envs": environment(env or []) or None,
    }
    vm = _client(api_key, base_url)
    password = None if password_file is None else password_file.read_text().strip()
    with held():
        row = vm.snapshots.create(
            image,
            name=name,
            vcpu_count=cpu,
            memory_mb=memory,
            build_args={key: value for key, value in args.items() if value is not None},
            registry_username=username,
            registry_password=password,
            egress_policy={"allowed_domains": domain, "allowed_cidrs": cidr} if domain or cidr else None,
        )
    try:
        _follow(vm, row["id"], quiet=as_json)
    except (Ended, BrokenPipeError):
        vm.snapshots.cancel(row["id"])
        raise
    row = vm.snapshots.get(row["id"])
    _print(row, as_json, row["id"])
    if row["status"] != "ready":
        raise SnapshotError(f"the build failed: {row['last_error']}")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Remove what takes disk on the server and belongs to nothing any more."""
    found = _client(api_key, base_url).snapshots.garbage(dry_run)
    word = "would be removed" if dry_run else "removed"
    _print(found, as_json, "\n".join(f"{word}: {one}" for one in found["removed"]) or "there is nothing to remove")


def _follow(vm: InstaVM, snapshot: str, *, quiet: bool) -> None:
    """Print what the build prints; on a terminal, with a bar below it that says how far it is."""
    console = Console(stderr=True, quiet=quiet, soft_wrap=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task, offset = bar.add_task("pending", total=1.0), 0
        while True:
            told = vm.snapshots.logs(snapshot, offset)
            offset = told["next_offset"]
            bar.update(task, description=told["stage"], completed=told["progress"])
            console.print(told["log"], end="", markup=False, highlight=False, emoji=False)
            if told["is_complete"]:
                return
            time.sleep(POLL_S)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
