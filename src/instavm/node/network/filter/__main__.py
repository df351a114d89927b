"""`python -m instavm.node.network.filter FD`: started by the server, told everything over a socket, gone when that closes."""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from typing import Any, Final

import anyio
import anyio.abc
import dns.edns
import dns.message
import dns.rrset

from instavm.node import descriptors
from instavm.node.jail import seccomp
from instavm.node.network import policy
from instavm.node.network.addresses import Host
from instavm.node.network.decision import Decider
from instavm.node.network.filter import connections, names
from instavm.node.network.filter.check import check
from instavm.node.network.filter.datagrams import Datagrams
from instavm.node.network.filter.dial import Dialer
from instavm.node.network.filter.place import Limits, Place

log = logging.getLogger(__name__)

MESSAGE_MAX: Final = 1 << 20
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
NOBODY: Final = 65534
LOOKUPS: Final = 128
"""Names that the host may be looking up at one time, for all sandboxes; for one: names.AT_ONCE."""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s egress filter: %(message)s")
    line = socket.socket(fileno=int(sys.argv[1]))
    _load()
    _drop()
    anyio.run(_serve, line)


def _load() -> None:
    """Have everything in memory that is imported when it is first used: later, its files may not be ours to read."""
    answer = dns.message.make_response(dns.message.make_query("a.example", "A"))
    answer.answer.append(dns.rrset.from_text("a.example.", 1, "IN", "A", "192.0.0.1"))
    answer.use_edns(0, options=[dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, "")])
    dns.message.from_wire(answer.to_wire())
    "a.example".encode("idna")


def _drop() -> None:
    """Be nobody, for good, with a list of system calls and of sockets. Raises OSError, HostNotReady."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptors.allow_most()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_PDEATHSIG, signal.SIGKILL)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    seccomp.confine(seccomp.program(seccomp.FILTER, without=seccomp.NOT_THE_FILTER, sockets=seccomp.FILTER_SOCKETS))


async def _serve(line: socket.socket) -> None:
    line.setblocking(False)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(LOOKUPS))
    async with anyio.create_task_group() as tasks:
        filter_ = Filter(tasks)
        while True:
            await anyio.wait_readable(line)
            data, fds, _, _ = socket.recv_fds(line, MESSAGE_MAX, 16)
            if not data:
                os._exit(0)
            ask = json.loads(data)
            if ask["do"] == "check":  # it may have to look a name up
                tasks.start_soon(_answer, line, ask, partial(filter_.check, ask))
            else:
                await _answer(line, ask, partial(filter_.handle, ask, fds))


async def _answer(line: socket.socket, ask: dict[str, Any], work: Callable[[], Awaitable[dict[str, Any]]]) -> None:
    try:
        said = await work()
    except Exception as exc:  # the edge of one request: it fails, the others go on
        log.exception("%s failed", ask.get("do"))
        said = {"error": f"{type(exc).__name__}: {exc}"}
    await asyncio.get_running_loop().sock_sendall(line, json.dumps({"id": ask["id"], **said}).encode())


class Filter:
    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self._tasks = tasks
        self._places: dict[str, Place] = {}
        self._host = Host()

    async def handle(self, ask: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        sockets = [socket.socket(fileno=fd) for fd in fds]
        match ask["do"]:
            case "begin":
                self._dialer = Dialer(ask["dns"], ask["proxy"])
                self._limits = Limits(ask["connections"], ask["bytes_per_s"])
            case "open":
                for one in sockets:
                    one.setblocking(False)
                place = self._places[ask["name"]] = Place(sockets, self._dialer, self._host, self._limits)
                place.put(policy.from_wire(ask["policy"]), frozenset(ask["closed_ports"]))
                self._tasks.start_soon(_live, place)
            case "close":
                if (gone := self._places.pop(ask["name"], None)) is not None:
                    gone.close()
            case "put":
                self._places[ask["name"]].put(policy.from_wire(ask["policy"]), frozenset(ask["closed_ports"]))
            case "policy":
                return {"told": self._places[ask["name"]].told()}
            case "log":
                place = self._places[ask["name"]]
                counts = {"sent": place.log.sent, "received": place.log.received, "open": len(place.flows)}
                return {"entries": place.log.entries(), **counts}
        return {}

    async def check(self, ask: dict[str, Any]) -> dict[str, Any]:
        if (by := ask["by"]) is None:
            decider = self._places[ask["name"]].decider
        else:
            decider = Decider(policy.from_wire(by["policy"]), self._host, frozenset(by["closed_ports"]))
        return {"decision": astuple(await check(decider, self._dialer, ask["host"], ask["port"], ask["protocol"]))}


async def _live(place: Place) -> None:
    """Everything of one sandbox; what goes wrong in here ends its network, and nobody else's."""
    try:
        with place.scope:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connections.serve, place, tasks)
                tasks.start_soon(names.over_udp, place, tasks)
                tasks.start_soon(names.over_tcp, place, tasks)
                tasks.start_soon(Datagrams(place, tasks).serve)
    except Exception:
        log.exception("the network of a sandbox was given up")
        place.close()


if __name__ == "__main__":
    main()
