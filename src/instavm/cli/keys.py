"""`instavm key create | list | revoke`: works on this host's database, whether or not the server runs."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import anyio
import typer
from rich.console import Console
from rich.table import Table

from instavm.cli.options import AsJson
from instavm.errors import InstaVMError
from instavm.settings import Settings

if TYPE_CHECKING:
    from instavm.control.accounts import Keys
    from instavm.control.store.accounts import KeyRow

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(
    description: Annotated[str, typer.Argument(help="What the key is for.")] = "",
    tenant: Annotated[str, typer.Option(help="Whose key; keys of one tenant see the same sandboxes.")] = "local",
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it. It cannot be shown again."""
    key_id, key = _with_keys(lambda keys: keys.create(description, tenant))
    print(json.dumps({"id": key_id, "key": key, "api_key": key}) if as_json else key)


@app.command(name="list")
def list_(as_json: AsJson = False) -> None:
    """List API keys."""
    rows = [_shown(row) for row in _with_keys(lambda keys: keys.list())]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(*(rows[0] if rows else ("id", "tenant", "key", "description", "created_at", "revoked_at")))
    for row in rows:
        table.add_row(*(str("" if value is None else value) for value in row.values()))
    Console().print(table)


@app.command()
def revoke(key_id: Annotated[int, typer.Argument(help="As shown by `instavm key list`.")]) -> None:
    """Revoke an API key; a running server refuses it within a second."""
    if not _with_keys(lambda keys: keys.revoke(key_id)):
        raise InstaVMError(f"there is no API key {key_id} that could be revoked")
    print(f"revoked {key_id}")


def _shown(row: KeyRow) -> dict[str, object]:
    return {
        "id": row.id,
        "tenant": row.tenant_id,
        "key": row.hint,
        "description": row.description,
        "created_at": row.created_at.isoformat(timespec="seconds"),
        "revoked_at": row.revoked_at and row.revoked_at.isoformat(timespec="seconds"),
    }


def _with_keys(work: Callable[[Keys], Awaitable[T]]) -> T:
    from instavm.control.accounts import Keys  # noqa: PLC0415 (the server's libraries are an extra)
    from instavm.control.store.database import open_accounts  # noqa: PLC0415

    async def run() -> T:
        async with open_accounts(Settings().database) as accounts:
            return await work(Keys(accounts))

    return anyio.run(run)
