"""`instavm exec`: code from the command line, a file or stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from instavm import limits
from instavm.cli.options import ApiKey, AsJson, BaseUrl, client, environment
from instavm.cli.signals import held
from instavm.cli.source import source
from instavm.cli.terminal import waiting
from instavm.client.explain import explain
from instavm.client.results import Execution
from instavm.client.streaming import StreamEvent
from instavm.client.sync import InstaVM

SLOW_S: Final = 3.0
"""A sandbox of a known size is there in less."""
PREPARING: Final = "still waiting: a sandbox of a new size has its template prepared first, which takes up to a minute"
FAILED: Final = 1
"""Exit status when the code's own is unknown."""


def execute(
    code: Annotated[
        str | None, typer.Argument(help="Code, the name of a file, or - for stdin (also when left out).")
    ] = None,
    *,
    language: Annotated[
        str | None,
        typer.Option(
            "--language", "-l", help="python, bash, sh or javascript. Else by the file's name or first line (#!), else python."
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds the code may take, 1 to 600.")] = None,
    cpu: Annotated[int | None, typer.Option(help="vCPUs, 1 to 8.")] = None,
    memory: Annotated[int | None, typer.Option(help="Memory in MB, 256 to 8192.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="May be repeated.")] = None,
    as_json: AsJson = False,
    api_key: ApiKey = None,
    base_url: BaseUrl = None,
) -> None:
    """Run code in a fresh sandbox; the exit status is the code's own."""
    text, spoken = source(code, language)
    vm = client(
        api_key,
        base_url,
        timeout=limits.LIFETIME_S_DEFAULT if timeout is None else _lifetime_s(timeout),
        cpu_count=cpu,
        memory_mb=memory,
        env=environment(env or []),
        auto_start_session=False,
    )
    with vm:
        with held():
            vm.start_session()
        with waiting(SLOW_S, PREPARING, still=lambda: not vm.is_session_active()):
            result = _result(vm, text, spoken, timeout, as_json=as_json)
    raise typer.Exit(FAILED if result.exit_code is None else result.exit_code & 0xFF)


def _lifetime_s(timeout: float) -> int:
    """Long enough for the code, with room for the answer."""
    return max(limits.LIFETIME_S_DEFAULT, int(timeout) + 60)


def _result(vm: InstaVM, code: str, language: str, timeout: float | None, *, as_json: bool) -> Execution:
    if not as_json:
        return _live(vm.stream(code, language, timeout))
    result = vm.execute(code, language, timeout)
    print(json.dumps(result))
    return result


def _live(events: Iterator[StreamEvent]) -> Execution:
    """Print what comes while it comes; the result."""
    for event in events:
        if event.type == "result":
            result: Execution = event.result
            if result.truncated:
                sys.stderr.write("[instavm] some of the output is missing\n")
            if result.reason is not None:
                sys.stderr.write(f"[instavm] {explain(result)}\n")
            return result
        if event.type in ("stdout", "stderr"):
            stream = sys.stdout if event.type == "stdout" else sys.stderr
            stream.write(event.text)
            stream.flush()
    raise AssertionError("the last event is the result")
