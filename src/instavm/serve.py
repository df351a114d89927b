"""Puts the server together: settings → node → store → app → HTTP. The only place where control and node meet.

`instavm serve` runs it in the foreground; the SDK starts `python -m instavm.serve --embedded`. Either is the node's process,
which starts control's (`python -m instavm.serve --control`) and serves it the node.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Final

import anyio

from instavm.border import confined, host, remote
from instavm.contract.node import Node
from instavm.control import listen, locks
from instavm.control.listen import Listener
from instavm.errors import HostNotReady, InstaVMError
from instavm.log import to_file, to_stderr
from instavm.node import descriptors, precedence
from instavm.settings import Settings
from instavm.wire.errors import Problem

log = logging.getLogger(__name__)

OpenNode = Callable[[Settings, Sequence[int]], AbstractAsyncContextManager[Node]]
"""Given the TCP ports on which control is reached, which no sandbox ever may."""

SWITCH_S: Final = 0.0005
CONTROL: Final = (sys.executable, "-P", "-m", "instavm.serve", "--control")


def runtime(settings: Settings, closed_ports: Sequence[int]) -> AbstractAsyncContextManager[Node]:
    """The node of this host."""
    from instavm.node.runtime import Runtime  # noqa: PLC0415 (only a real server needs it)

    return Runtime.open(settings, closed_ports)


async def serve(
    settings: Settings, listener: Listener, *, open_node: OpenNode = runtime, ready: Callable[[], None] = lambda: None
) -> int:
    """Serve until SIGTERM or SIGINT, or (`ends_when_idle`) until nobody needs it. All sandboxes end then, but
    for those that `on_shutdown` says to leave.

    ready: called once, when calls are answered.
    Returns: control's exit status, 0 when it ended as it should.
    Raises: HostNotReady, and whatever the node says when it cannot be opened.
    """
    precedence.first(os.getpid())
    descriptors.allow_most()
    passes = {"listener": listener.socket.fileno()}
    with locks.only_server(settings.server_lock), contextlib.ExitStack() as undo:
        if listener.ends_when_idle:
            passes["start-lock"] = locks.opened(settings.start_lock)
            undo.callback(os.close, passes["start-lock"])
        around = undo.enter_context(confined.confinement(settings))
        control = host.Control((*CONTROL, *listener.options()), passes, _refused, around)
        with listen.named(listener.socket):
            return await host.host(control, open_node(settings, listener.ports), ready, listener.socket.close)


def run(
    settings: Settings,
    listener: Listener,
    *,
    open_node: OpenNode = runtime,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """`serve` as a program of its own, in the foreground. Raises: as `serve`, without groups around it."""
    to_stderr()
    sys.setswitchinterval(SWITCH_S)
    with _ungrouped():
        return anyio.run(lambda: serve(settings, listener, open_node=open_node, ready=ready))


def run_embedded(arguments: Sequence[str], *, open_node: OpenNode = runtime) -> int:
    """`serve` in the background, started by a client that waits at the other end of `--ready-fd`.

    Returns: the exit status. What goes wrong until the server is ready is told to the client.
    """
    options = _options(arguments)
    if os.fork():
        return 0
    os.chdir("/")
    sys.setswitchinterval(SWITCH_S)
    waiting = _Waiting(options.ready_fd, options.lock_fd, quiet=True)
    try:
        settings = Settings()
        to_file(settings.server_log)
        listener = Listener(listen.on_socket(settings.socket), private=True, ends_when_idle=True)
        with _ungrouped():
            return anyio.run(lambda: serve(settings, listener, open_node=open_node, ready=waiting.ready))
    except InstaVMError as exc:
        waiting.failed(str(exc), exc.code)
    except Exception as exc:
        log.exception("the embedded server failed")
        waiting.failed(f"the embedded server could not start: {type(exc).__name__}: {exc}", "host_not_ready")
    return 1


def run_control(arguments: Sequence[str]) -> int:
    """Control's process: inherits its listener, and a link to the node that started it. Returns: the exit status.

    Without its node it is nothing: when that goes, it goes at once, as if killed with it.
    """
    from instavm.control.serving import Ends, serve_control  # noqa: PLC0415 (libraries that the node's process has no use for)

    options = _control_options(arguments)
    sys.setswitchinterval(SWITCH_S)
    settings = Settings()
    if options.ends_when_idle:
        to_file(settings.control_log)
    else:
        to_stderr()
    waiting = _Waiting(options.ready_fd, quiet=options.ends_when_idle)
    listener = Listener(
        socket.socket(fileno=options.listener_fd),
        options.private,
        options.ends_when_idle,
        options.owner,
        options.start_lock_fd,
    )
    ends = Ends()
    node = remote.connected(socket.socket(fileno=options.link_fd), lambda: os._exit(1), ends.asked)
    try:
        with _ungrouped():
            anyio.run(lambda: serve_control(settings, listener, node, waiting.ready, ends))
    except InstaVMError as exc:
        waiting.failed(str(exc), exc.code)
        return 1
    except Exception as exc:
        log.exception("the API failed")
        waiting.failed(f"the API could not start: {type(exc).__name__}: {exc}", "host_not_ready")
        return 1
    return 0


def _refused(said: bytes) -> InstaVMError:
    return HostNotReady(Problem.model_validate_json(said).detail)


class _Waiting:
    """Whoever started us and waits to hear that we answer; a client also holds the start lock with us until then."""

    def __init__(self, ready_fd: int, *held: int, quiet: bool) -> None:
        """quiet: let go of the terminal too, once ready: who started it has other things to do there."""
        self._quiet = quiet
        self._fds = [ready_fd, *held]
        for fd in self._fds:
            os.set_inheritable(fd, False)

    def ready(self) -> None:
        self._tell(b"ready\n")
        if not self._quiet:
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)

    def failed(self, detail: str, code: str) -> None:
        self._tell(Problem(detail=detail, code=code).model_dump_json().encode())

    def _tell(self, words: bytes) -> None:
        """Once; the client may be gone by now, which is its own affair."""
        if self._fds:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._fds[0], words)
            for fd in self._fds:
                os.close(fd)
            self._fds = []


@contextlib.contextmanager
def _ungrouped() -> Iterator[None]:
    """Task groups wrap what is raised inside them; a caller wants the one error that it was."""
    try:
        yield
    except BaseExceptionGroup as group:
        inner: BaseException = group
        while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
            inner = inner.exceptions[0]
        raise inner from None


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m instavm.serve", description="For the SDK's own use.")
    parser.add_argument("--embedded", action="store_true", required=True)
    parser.add_argument("--ready-fd", type=int, required=True)
    parser.add_argument("--lock-fd", type=int, required=True)
    return parser.parse_args(arguments)


def _control_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m instavm.serve", description="For the node's own use.")
    parser.add_argument("--control", action="store_true", required=True)
    for flag in ("--private", "--ends-when-idle"):
        parser.add_argument(flag, action="store_true")
    for name in ("--owner", "--link-fd", "--ready-fd", "--listener-fd"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--start-lock-fd", type=int)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit((run_control if "--control" in sys.argv else run_embedded)(sys.argv[1:]))
