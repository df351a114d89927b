"""UDP from a sandbox to an address range that its policy names. Answers go back under the address that was written to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from ipaddress import IPv4Address
from typing import Final

import anyio
import anyio.abc

from instavm.node.network.addresses import GUEST
from instavm.node.network.filter.place import Flow, Place

FLOWS_MAX: Final = 64
IDLE_S: Final = 60.0
DATAGRAM_MAX: Final = 1 << 16
UDP: Final = 17
Key = tuple[int, str, int]
"""The guest's port, the address, the port there."""


class Datagrams:
    def __init__(self, place: Place, tasks: anyio.abc.TaskGroup) -> None:
        self._place, self._tasks = place, tasks
        self._links: dict[Key, socket.socket] = {}

    async def serve(self) -> None:
        place = self._place
        while True:
            await anyio.wait_readable(place.datagrams)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._one(*place.datagrams.recvmsg(DATAGRAM_MAX, 256))

    def _one(self, data: bytes, ancillary: list[tuple[int, int, bytes]], _flags: int, sender: tuple[str, int]) -> None:
        place = self._place
        to = next((content for level, kind, content in ancillary if (level, kind) == (socket.SOL_IP, 20)), None)
        if to is None:
            return
        port, packed = struct.unpack_from("!H4s", to, 2)
        address = IPv4Address(packed)
        verdict = place.decider.verdict(None, address, port, "udp")
        key = (sender[1], str(address), port)
        link = self._links.get(key)
        if verdict.allowed and link is None and len(self._links) >= FLOWS_MAX:
            place.log.add(address=str(address), port=port, protocol="udp", allowed=False, rule="connections")
            return
        if not verdict.allowed or link is None:
            place.log.add(address=str(address), port=port, protocol="udp", allowed=verdict.allowed, rule=verdict.rule)
        if not verdict.allowed:
            return
        if link is None:
            link = self._links[key] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            link.connect((str(address), port))
            self._tasks.start_soon(self._answers, key, link, Flow(None, address, port, "udp"))
        place.log.sent += len(data)
        with contextlib.suppress(OSError):  # a datagram that is lost is a datagram
            link.send(data)

    async def _answers(self, key: Key, link: socket.socket, flow: Flow) -> None:
        place, loop = self._place, asyncio.get_running_loop()
        place.flows.add(flow)
        try:
            with flow.scope:
                while True:
                    with anyio.fail_after(IDLE_S):
                        data = await loop.sock_recv(link, DATAGRAM_MAX)
                    place.log.received += len(data)
                    await place.down.take(len(data))
                    place.answers.sendto(packet(key, data), (GUEST, 0))
        except (OSError, TimeoutError):
            return
        finally:
            place.flows.discard(flow)
            del self._links[key]
            link.close()


def packet(key: Key, data: bytes) -> bytes:
    """From where the guest wrote to, back to the guest; the kernel fills in what is 0."""
    guest_port, address, port = key
    udp = struct.pack("!HHHH", port, guest_port, 8 + len(data), 0) + data
    source, target = IPv4Address(address).packed, IPv4Address(GUEST).packed
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, UDP, 0, source, target) + udp
