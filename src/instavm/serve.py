"""Puts the server together: settings → node → store → app → HTTP. The only place where control and node meet.

`instavm serve` runs it in the foreground; the SDK starts `python -m instavm.serve --embedded`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

import anyio
import uvicorn
from fastapi import FastAPI

from instavm.control import listen, locks
from instavm.control.app import control_of, create_app
from instavm.control.node import Node
from instavm.control.quotas import Policy
from instavm.control.store.database import open_store
from instavm.errors import InstaVMError
from instavm.log import to_file, to_stderr
from instavm.settings import Settings
from instavm.wire.errors import Problem

log = logging.getLogger(__name__)

OpenNode = Callable[[Settings], AbstractAsyncContextManager[Node]]

SWITCH_S: Final = 0.0005
GRACE_S: Final = 10
"""How long calls that are still running when the server stops may take to be answered."""
KEEP_ALIVE_S: Final = 75
KEEP_ALIVE_EMBEDDED_S: Final = 10**9
"""An open connection is how the embedded server knows that a client is there, so it never closes one."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to serve. `private`: a socket that only its owner can open; any API key means the local user."""

    socket: socket.socket
    private: bool
    ends_when_idle: bool = False
    traffic: listen.Traffic = field(default_factory=listen.Traffic)


def runtime(settings: Settings) -> AbstractAsyncContextManager[Node]:
    """The node of this host."""
    from instavm.node.runtime import Runtime  # noqa: PLC0415 (only a real server needs it)

    return Runtime.open(settings)


async def serve(
    settings: Settings,
    listener: Listener,
    *,
    open_node: OpenNode = runtime,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, or (`ends_when_idle`) until nobody needs it. All sandboxes end then, but
    for those that `on_shutdown` says to leave.

    ready: called once, when calls are answered.
    Raises: HostNotReady, and whatever the node says when it cannot be opened.
    """
    sys.setswitchinterval(SWITCH_S)
    with locks.only_server(settings.server_lock):
        async with open_node(settings) as node, open_store(settings.database) as store:
            policy = Policy.of_one_user(settings) if listener.private else Policy.of(settings)
            app = create_app(node, store, private=listener.private, policy=policy)
            server = Server(http_config(app, listener), ready)
            async with anyio.create_task_group() as tasks:
                leaves = settings.on_shutdown == "leave" and not listener.ends_when_idle
                await tasks.start(_until_signal, server, app, listener, leaves)
                if listener.ends_when_idle:
                    tasks.start_soon(_until_idle, settings, server, app, listener)
                await server.serve(sockets=[listener.socket])
                tasks.cancel_scope.cancel()


class Server(uvicorn.Server):
    """Tells when it answers, and leaves signals to us."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        raise AssertionError("no signal is routed here")


def http_config(app: FastAPI, listener: Listener) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=listen.private_protocol(listener.traffic) if listener.private else "auto",
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=listen.BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_EMBEDDED_S if listener.private else KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
    )


async def _until_signal(
    server: Server,
    app: FastAPI,
    listener: Listener,
    leaves: bool,
    *,
    task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal ends the sandboxes (or leaves them), and so every call that waits for one; a second ends at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("%s: stopping", signal.Signals(number).name)
            if server.should_exit:
                server.force_exit = True
                return
            server.should_exit = True
            _take_no_more(server, listener)
            if server.started:
                control = control_of(app)
                await (control.leave() if leaves else control.stop())


def _take_no_more(server: Server, listener: Listener) -> None:
    """Whoever comes now finds nobody here, and starts a server of their own if they can."""
    listen.forget(listener.socket)
    for one in server.servers if server.started else ():
        one.close()


async def _until_idle(settings: Settings, server: Server, app: FastAPI, listener: Listener) -> None:
    """End the server after `idle_exit_s` without a connection and without a sandbox.

    The start lock is taken first and kept until the process is gone: a client that comes just then finds no
    socket, waits for the lock, and starts a new server.
    """
    traffic, last_use = listener.traffic, time.monotonic()
    while True:
        await anyio.sleep(max(0.0, max(last_use, traffic.quiet_since) + settings.idle_exit_s - time.monotonic()))
        if not server.started or traffic.open or len(control_of(app).vms):
            last_use = time.monotonic()
        elif time.monotonic() >= max(last_use, traffic.quiet_since) + settings.idle_exit_s:
            if locks.keep(settings.start_lock):
                log.info("nobody has needed this server for %g s: ending", settings.idle_exit_s)
                _take_no_more(server, listener)
                server.should_exit = True
                return
            last_use = time.monotonic()


def run(
    settings: Settings,
    listener: Listener,
    *,
    open_node: OpenNode = runtime,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """`serve` as a program of its own, in the foreground. Raises: as `serve`, without groups around it."""
    to_stderr()
    with _ungrouped():
        anyio.run(lambda: serve(settings, listener, open_node=open_node, ready=ready))


def run_embedded(arguments: Sequence[str], *, open_node: OpenNode = runtime) -> int:
    """`serve` in the background, started by a client that waits at the other end of `--ready-fd`.

    Returns: the exit status. What goes wrong until the server is ready is told to the client.
    """
    options = _options(arguments)
    if os.fork():
        return 0
    os.chdir("/")
    waiting = _Waiting(options.ready_fd, options.lock_fd)
    try:
        settings = Settings()
        to_file(settings.server_log)
        listener = Listener(listen.on_socket(settings.socket), private=True, ends_when_idle=True)
        with _ungrouped():
            anyio.run(lambda: serve(settings, listener, open_node=open_node, ready=waiting.ready))
    except InstaVMError as exc:
        waiting.failed(str(exc), exc.code)
        return 1
    except Exception as exc:
        log.exception("the embedded server failed")
        waiting.failed(f"the embedded server could not start: {type(exc).__name__}: {exc}", "host_not_ready")
        return 1
    return 0


class _Waiting:
    """The client that waits for us, and the start lock that we hold together until we are ready."""

    def __init__(self, ready_fd: int, lock_fd: int) -> None:
        self._fds = [ready_fd, lock_fd]
        for fd in self._fds:
            os.set_inheritable(fd, False)

    def ready(self) -> None:
        self._tell(b"ready\n")
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


if __name__ == "__main__":
    sys.exit(run_embedded(sys.argv[1:]))
