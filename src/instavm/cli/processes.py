"""`instavm run | ps | logs | kill`: programs in the background of a session's sandbox."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperOption

from instavm import limits
from instavm.cli.options import ApiKey, AsJson, BaseUrl, client, environment
from instavm.cli.signals import Ended, held
from instavm.client.processes import Process
from instavm.client.sync import InstaVM
from instavm.errors import ProcessEnded

Session = Annotated[str, typer.Argument(help="Id of the session in whose sandbox it runs.")]
ProcessId = Annotated[str, typer.Argument(metavar="PROCESS", help="Id of the process, as `instavm ps` shows it.")]
GRACE_S: Final = 5.0
"""How long a process may take to end by itself after a signal to end."""
SHOWN = ("process_id", "pid", "status", "exit_code", "started_at", "command")


class Run(TyperCommand):
    """What follows the program belongs to it: `instavm run SESSION ls -la` needs no `--`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._with_end_of_options(args))

    def _with_end_of_options(self, args: list[str]) -> list[str]:
        """A command in one argument with spaces is a line for the shell: behind it, options are still ours."""
        takes_value = {name: not one.is_flag for one in self.params for name in one.opts if isinstance(one, TyperOption)}
        at, words = 0, 0
        while at < len(args) and args[at] != "--":
            if args[at].startswith("-") and args[at] != "-":
                at += 2 if takes_value.get(args[at], False) else 1
                continue
            words += 1
            if words == 2 and not re.search(r"\s", args[at]):
                return [*args[:at], "--", *args[at:]]
            at += 1
        return args


def run(
    session: Session,
    command: Annotated[list[str], typer.Argument(help="A line for bash, or a program with its arguments.")],
    *,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Print its id and let it run.")] = False,
    cwd: Annotated[str | None, typer.Option(help="Where it runs; else /app.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="May be repeated.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Start a process; without --detach, print what it writes and pass its exit status on.

    Ctrl-C, or another signal to end, is passed on to the process, which is killed if it does not end.
    """
    with _bound(session, api_key, base_url) as vm:
        line = command[0] if len(command) == 1 else command
        with held():
            process = vm.processes.start(line, env=environment(env or []), cwd=cwd)
        if as_json or detach:
            print(json.dumps(process.info) if as_json else process.id)
            return
        shown = Shown(process)
        try:
            shown.follow(0)
        except Ended as exc:
            _end(process, shown, exc.number)
            raise
        except BrokenPipeError:
            process.kill()
            raise
        raise typer.Exit(_status(process))


def ps(session: Session, *, as_json: AsJson = False, api_key: ApiKey = None, base_url: BaseUrl = None) -> None:
    """List processes."""
    with _bound(session, api_key, base_url) as vm:
        rows = vm.processes.list()
    if as_json:
        print(json.dumps(rows))
        return
    table = Table()
    for name in SHOWN:
        table.add_column(name, no_wrap=name == "process_id")
    for row in rows:
        table.add_row(*("" if row[name] is None else str(row[name]) for name in SHOWN))
    Console().print(table)


def logs(
    session: Session,
    process: ProcessId,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    since: Annotated[int, typer.Option(help="Position in its output from which to print.")] = 0,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Print what a process has written, as far as it is kept."""
    with _bound(session, api_key, base_url) as vm:
        found = vm.processes.get(process)
        if follow:
            Shown(found).follow(since)
            return
        window = found.read(since)
    if as_json:
        print(json.dumps(window))
        return
    _lost(window["lost"])
    sys.stdout.write(window["stdout"])
    sys.stderr.write(window["stderr"])


def kill(
    session: Session,
    process: ProcessId,
    *,
    signal: Annotated[str, typer.Option("--signal", "-s", help="One of " + ", ".join(limits.SIGNALS))] = "KILL",
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Send a process a signal; without --signal, end it and all that it has started."""
    with _bound(session, api_key, base_url) as vm:
        found = vm.processes.get(process)
        found.signal(signal)
        if as_json:
            print(json.dumps(found.info))


@contextmanager
def _bound(session: str, api_key: str | None, base_url: str | None) -> Iterator[InstaVM]:
    """A client of a session that is there already, and stays."""
    vm = client(api_key, base_url, auto_start_session=False)
    try:
        vm.session_id = session
        yield vm
    finally:
        vm.close()


class Shown:
    """Prints what a process writes, and remembers how far it was printed."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.position = 0

    def follow(self, since: int) -> None:
        """Until its end."""
        self.position = since
        for event in self._process.follow(since):
            if event.type == "lost":
                _lost(event.lost)
            elif event.type in ("stdout", "stderr"):
                stream = sys.stdout if event.type == "stdout" else sys.stderr
                stream.write(event.text)
                self.position = event.position
                stream.flush()


def _end(process: Process, shown: Shown, number: int) -> None:
    """Pass the signal on, and show what the process writes until it ends; kill it when it takes too long."""
    try:
        process.signal(number)
        process.wait(GRACE_S)
    except ProcessEnded:
        pass
    except TimeoutError:
        process.kill()
    shown.follow(shown.position)


def _lost(size_bytes: int) -> None:
    if size_bytes:
        sys.stderr.write(f"[instavm] {size_bytes} bytes before this are not kept any more\n")


def _status(process: Process) -> int:
    result = process.result
    return 1 if result is None or result.exit_code is None else result.exit_code
