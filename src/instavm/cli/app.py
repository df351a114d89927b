"""All commands, and how each of them ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from pydantic_settings import SettingsError
from typer.core import TyperGroup

from instavm.cli import (
    bench,
    doctor,
    egress,
    execute,
    isolation,
    keys,
    processes,
    server,
    signals,
    snapshots,
    templates,
    tenants,
    terminal,
    version,
)
from instavm.errors import InstaVMError


class Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Typer would end with exit status 1 when nobody reads the output, as if the command had failed."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            terminal.give_up_output()
            raise signals.Ended(terminal.PIPE) from exc


app = typer.Typer(
    name="instavm",
    cls=Commands,
    help="Run code in a microVM of its own, on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def instavm(
    _version: Annotated[
        bool, typer.Option("--version", callback=version.asked, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


app.command("exec", help="Run code in a fresh sandbox and print what it prints.")(execute.execute)
app.command("run", cls=processes.Run, help="Run a program in a session's sandbox; --detach lets it run.")(processes.run)
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
    terminal.prepare()
    try:
        with signals.raised():
            status = _status(arguments)
        sys.stdout.flush()
        return status
    except signals.Ended as exc:
        return exc.exit_status
    except BrokenPipeError:
        terminal.give_up_output()
        return terminal.NOBODY_READS
    except OSError as exc:  # a disk that is full, a file that is not there: of this computer, and nothing of ours to trace
        terminal.give_up_output()
        print(f"Error: {exc}", file=sys.stderr)
        return 1


def _status(arguments: Sequence[str] | None) -> int:
    try:
        app(args=arguments, prog_name="instavm")
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except (InstaVMError, SettingsError) as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 1
    return 0
