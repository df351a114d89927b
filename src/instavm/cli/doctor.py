"""`instavm doctor`: what this host lacks, and how to get it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console

from instavm.cli.options import AsJson
from instavm.client.embedded import NEEDS
from instavm.settings import Settings


def doctor(as_json: AsJson = False) -> None:
    """Check every precondition: ok, missing or weaker. Exit status 1 when something must be done before sandboxes start."""
    found = [*_programs(), *_host()]
    if as_json:
        print(json.dumps(found))
    else:
        _show(found)
    raise typer.Exit(0 if all(check["ok"] for check in found) else 1)


def _programs() -> Iterable[dict[str, Any]]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield _check("python", sys.version_info >= (3, 11), version, "Python 3.11 or newer")
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    yield _check(
        "server libraries",
        not missing,
        f"missing: {', '.join(missing)}" if missing else "installed",
        "pip install 'instavm-selfhosted[server]'",
    )


def _host() -> Iterable[dict[str, Any]]:
    try:
        from instavm.node.doctor import checks  # noqa: PLC0415 (the server's libraries are an extra)
    except ModuleNotFoundError as exc:
        remedy = "pip install 'instavm-selfhosted[server]'"
        return [_check("host", False, f"cannot be checked without {exc.name}", remedy)]
    return [asdict(check) for check in checks(Settings())]


def _check(name: str, ok: bool, detail: str, remedy: str) -> dict[str, Any]:
    return {
        "name": name,
        "ok": ok,
        "detail": detail,
        "remedy": "" if ok else remedy,
        "status": "ok" if ok else "missing",
    }


def _show(found: list[dict[str, Any]]) -> None:
    """Red is what keeps sandboxes from being started as asked; yellow is what they do without."""
    console = Console(highlight=False)
    for check in found:
        colour = "red" if not check["ok"] else "green" if check["status"] == "ok" else "yellow"
        console.print(f"[{colour}]{check['status']:<7}[/] {check['name']}: ", end="")
        console.print(check["detail"], markup=False)
        if check["status"] != "ok" and check["remedy"]:
            console.print(f"        {check['remedy']}", markup=False)
