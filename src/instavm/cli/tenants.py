"""`instavm tenant list | quota`: works on this host's database, whether or not the server runs."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, TypeVar

import anyio
import typer
from rich.console import Console
from rich.table import Table

from instavm.cli.options import AsJson
from instavm.errors import InstaVMError
from instavm.settings import Settings

if TYPE_CHECKING:
    from instavm.control.accounts import Tenants
    from instavm.control.store.accounts import Tenant

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List tenants and what each may have; nothing = what the server's settings say."""
    rows = [_shown(tenant) for tenant in _with_tenants(lambda tenants: tenants.list())]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str("" if value is None else value) for value in row.values()))
    Console().print(table)


@app.command()
def quota(
    tenant: Annotated[str, typer.Argument(help="As shown by `instavm tenant list`.")],
    sandboxes: Annotated[int | None, typer.Option(min=0, help="How many at one time.")] = None,
    vcpus: Annotated[int | None, typer.Option(min=0, help="vCPUs of all of them together.")] = None,
    memory: Annotated[int | None, typer.Option(min=0, help="Memory of all of them together, in MB.")] = None,
    disk: Annotated[int | None, typer.Option(min=0, help="Snapshots and suspended sandboxes together, in MB.")] = None,
    lifetime: Annotated[int | None, typer.Option(min=20, help="Longest lifetime of one, in seconds.")] = None,
) -> None:
    """Set what a tenant may have; what is left out goes back to the server's settings.

    A running server follows within a second.
    """
    from instavm.control.store.accounts import Quota  # noqa: PLC0415 (the server's libraries are an extra)

    wanted = Quota(sandboxes, vcpus, memory, lifetime, disk)
    if not _with_tenants(lambda tenants: tenants.set_quota(tenant, wanted)):
        raise InstaVMError(f"there is no tenant {tenant!r}; `instavm key create --tenant {tenant}` makes it")
    print(f"set for {tenant}")


def _shown(tenant: Tenant) -> dict[str, object]:
    return {"tenant": tenant.id, "name": tenant.name, **asdict(tenant.quota)}


def _with_tenants(work: Callable[[Tenants], Awaitable[T]]) -> T:
    from instavm.control.accounts import Tenants  # noqa: PLC0415 (the server's libraries are an extra)
    from instavm.control.store.database import open_accounts  # noqa: PLC0415

    async def run() -> T:
        async with open_accounts(Settings().database) as accounts:
            return await work(Tenants(accounts))

    return anyio.run(run)
