"""What the filter knows of one sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, Final

import anyio

from instavm.contract.egress import Egress
from instavm.node.network.addresses import STAND_INS, Address, Host
from instavm.node.network.decision import Decider
from instavm.node.network.filter.dial import Dialer
from instavm.node.network.filter.seen import Log
from instavm.node.network.policy import Policy, to_wire

NAMES_MAX: Final = 4096
"""Stand-ins of one sandbox; of more, the oldest name loses its own."""
FIRST: Final = int(STAND_INS.network_address) + 256
CHUNK: Final = 256 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    connections: int
    bytes_per_s: float | None


class Bucket:
    """Bytes per second, on average, with a tenth of a second's worth at once."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        if self._rate is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 0.1) + count / self._rate
        if self._free_at > now:
            await anyio.sleep(self._free_at - now)


@dataclass(eq=False, slots=True)
class Flow:
    """An open connection: what it goes for, and how it is cut."""

    name: str | None
    address: Address | None
    """The one that was dialled; with a proxy between, None for a name."""
    port: int
    protocol: str = "tcp"
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    opening: bytes = b""
    """The first bytes that came, which tell the protocol; empty before they have been read."""


class Place:
    def __init__(self, sockets: list[socket.socket], dialer: Dialer, host: Host, limits: Limits) -> None:
        self.connections, self.names, self.names_over_tcp, self.datagrams, self.answers, refusals = sockets
        self._sockets = sockets
        self.dialer, self.host, self.limits = dialer, host, limits
        self.decider = Decider(Policy(Egress()), host, frozenset())
        self.log = Log(refusals)
        self.flows: set[Flow] = set()
        self.explaining = 0
        """Refused connections that are told why at this moment."""
        self.up, self.down = Bucket(limits.bytes_per_s), Bucket(limits.bytes_per_s)
        self.scope = anyio.CancelScope()
        self._stand_ins: dict[str, IPv4Address] = {}
        self._names: dict[IPv4Address, str] = {}
        self._next = 0

    def close(self) -> None:
        self.scope.cancel()
        for one in self._sockets:
            one.close()

    @property
    def policy(self) -> Policy:
        return self.decider.policy

    def put(self, policy: Policy, closed_ports: frozenset[int]) -> None:
        """From now on this holds; connections that it does not allow are cut before anything else happens."""
        self.decider = Decider(policy, self.host, closed_ports)
        for flow in list(self.flows):
            if self.still(flow) is not None:
                self.log.add(
                    name=flow.name,
                    address=None if flow.name else str(flow.address),
                    port=flow.port,
                    protocol=flow.protocol,
                    allowed=False,
                    rule="policy_changed",
                )
                flow.scope.cancel()

    def told(self) -> dict[str, Any]:
        """What it goes by, in the words in which it was told."""
        return {"policy": to_wire(self.policy), "closed_ports": sorted(self.decider.closed_ports)}

    def still(self, flow: Flow) -> str | None:
        """Why an open connection is not allowed any more; None while it is."""
        verdict = self.decider.verdict(flow.name, flow.address, flow.port, flow.protocol)
        if not verdict.allowed:
            return verdict.rule
        if flow.name is not None and flow.address is not None:
            return self.decider.unfit(flow.address, flow.port, verdict)
        return None

    def stand_in(self, name: str) -> IPv4Address:
        """The name's own address in here; the same one every time."""
        if (known := self._stand_ins.get(name)) is not None:
            return known
        address = IPv4Address(FIRST + self._next % NAMES_MAX)
        self._next += 1
        if (oldest := self._names.get(address)) is not None:
            del self._stand_ins[oldest]
        self._stand_ins[name], self._names[address] = address, name
        return address

    def name_of(self, address: Address) -> str | None:
        return self._names.get(address) if isinstance(address, IPv4Address) else None

    async def receive(self, guest: socket.socket) -> bytes:
        """From the guest, counted and no faster than its limit."""
        data = await asyncio.get_running_loop().sock_recv(guest, CHUNK)
        self.log.sent += len(data)
        await self.up.take(len(data))
        return data

    async def send(self, guest: socket.socket, data: bytes) -> None:
        """To the guest, counted and no faster than its limit."""
        self.log.received += len(data)
        await self.down.take(len(data))
        await asyncio.get_running_loop().sock_sendall(guest, data)


@contextlib.contextmanager
def ungrouped() -> Iterator[None]:
    """Out of a task group's errors, the first one."""
    try:
        yield
    except BaseExceptionGroup as group:
        inner: BaseException = group
        while isinstance(inner, BaseExceptionGroup):
            inner = inner.exceptions[0]
        raise inner from None


def reset(one: socket.socket) -> None:
    """Close with a reset, so that the other side is told at once."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
