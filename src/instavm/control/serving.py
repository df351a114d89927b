"""HTTP over a listener: until a signal, or until nobody needs it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Final

import anyio
import anyio.abc
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from instavm.contract.node import Node
from instavm.control import listen, locks
from instavm.control.app import control_of, create_app
from instavm.control.listen import Listener, Traffic
from instavm.control.quotas import Policy
from instavm.control.store.database import open_store
from instavm.settings import Settings

log = logging.getLogger(__name__)

GRACE_S: Final = 10
"""How long calls that are still running when the server stops may take to be answered."""
KEEP_ALIVE_S: Final = 75
KEEP_ALIVE_EMBEDDED_S: Final = 10**9
"""An open connection is how the embedded server knows that a client is there, so it never closes one."""


class Ends:
    """Requests to end the server: what its node passes on; and a signal of its own, of which only the first counts."""

    def __init__(self) -> None:
        self._tell, self._told = anyio.create_memory_object_stream[int](16)

    def asked(self, number: int) -> None:
        with contextlib.suppress(anyio.WouldBlock):  # it has been told often enough
            self._tell.send_nowait(number)

    async def listen(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            self.asked(await anext(aiter(signals)))
            await anyio.sleep_forever()

    def __aiter__(self) -> AsyncIterator[int]:
        return aiter(self._told)


async def serve_control(
    settings: Settings,
    listener: Listener,
    opened: AbstractAsyncContextManager[Node],
    ready: Callable[[], None],
    ends: Ends,
) -> None:
    """Control's half of `serve`: everything that reads what clients send."""
    async with opened as node, open_store(settings.database) as store:
        policy = Policy.of_one_user(settings) if listener.private else Policy.of(settings)
        app = create_app(node, store, private=listener.private, policy=policy)
        server = Server(http_config(app, listener), ready)
        async with anyio.create_task_group() as tasks:
            leaves = settings.on_shutdown == "leave" and not listener.ends_when_idle
            await tasks.start(ends.listen)
            tasks.start_soon(_until_asked, ends, server, app, listener, leaves)
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


def private_protocol(traffic: Traffic, owner: int) -> type[HttpToolsProtocol]:
    """HTTP for a private socket: counts connections, and closes those of other users at once."""

    class PrivateProtocol(HttpToolsProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            traffic.came()
            super().connection_made(transport)
            if listen.peer_uid(transport.get_extra_info("socket")) != owner:
                transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            traffic.went()
            super().connection_lost(exc)

    return PrivateProtocol


def http_config(app: FastAPI, listener: Listener) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=private_protocol(listener.traffic, listener.owner) if listener.private else "auto",
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


async def _until_asked(ends: Ends, server: Server, app: FastAPI, listener: Listener, leaves: bool) -> None:
    """The first request ends the sandboxes (or leaves them), and so every call that waits for one; a second ends at once."""
    async for number in ends:
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
            if listener.start_lock is None or locks.taken(listener.start_lock):
                log.info("nobody has needed this server for %g s: ending", settings.idle_exit_s)
                _take_no_more(server, listener)
                server.should_exit = True
                return
            last_use = time.monotonic()
