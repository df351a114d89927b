"""All commands, and how each of them ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import typer

from instavm.cli import (
    bench,
    doctor,
    egress,
    execute,
    isolation,
    keys,
    processes,
    server,
    snapshots,
    templates,
    tenants,
    version,
)
from instavm.errors import InstaVMError

INTERRUPTED: Final = 130

app = typer.Typer(
    name="instavm",
    help="Run code in a microVM of its own, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("exec", help="Run code in a fresh sandbox and print what it prints.")(execute.execute)
app.command("run", help="Run a program in a session's sandbox, in the background with --detach.")(processes.run)
app.command("ps", help="List the processes of a session's sandbox.")(processes.ps)
app.command("logs", help="Print what a process has written.")(processes.logs)
app.command("kill", help="End a process, or send it a signal.")(processes.kill)
app.command("serve", help="Serve the HTTP API in the foreground.")(server.serve)
app.command("doctor", help="Check what this host needs to run sandboxes.")(doctor.doctor)
app.command("bench", help="Measure how fast this machine starts and runs sandboxes.")(bench.bench)
app.command("version", help="Print the version.")(version.version)
app.add_typer(egress.app, name="egress", help="What a sandbox may reach, and where it went.")
app.add_typer(isolation.app, name="isolation", help="What confines a sandbox, signed by its host.")
app.add_typer(templates.app, name="template", help="Templates: what their clones have in common.")
app.add_typer(keys.app, name="key", help="API keys of this host's server.")
app.add_typer(snapshots.app, name="snapshot", help="Disks to start sandboxes from: taken of VMs, or built from images.")
app.add_typer(tenants.app, name="tenant", help="Accounts of this host's server, and what each may have.")


def run(arguments: Sequence[str] | None = None) -> int:
    """Returns: the exit status; 2 for a command line that cannot be read."""
    try:
        app(args=arguments, prog_name="instavm")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except InstaVMError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
