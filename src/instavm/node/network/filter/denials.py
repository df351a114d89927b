"""What a client in a sandbox is told when it is refused: JSON if it speaks HTTP, an alert if it speaks TLS, else a reset."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from typing import Final

import anyio

from instavm import refusals
from instavm.node.network.filter.place import Flow, Place
from instavm.node.network.filter.seen import Refused

ACCESS_DENIED: Final = b"\x15\x03\x03\x00\x02\x02\x31"
"""A TLS record with a fatal alert (RFC 8446, 6.2)."""
TLS_HANDSHAKE: Final = 22
REQUEST: Final = re.compile(rb"[A-Z]{2,20} ")
OPENING_MAX: Final = 64
OPENING_S: Final = 0.5
"""How long a client on a web port may take to show which protocol it speaks."""
FAREWELL_S: Final = 1.0
AT_ONCE: Final = 32
"""Refused connections of one sandbox that are told why; of more, the others are reset at once."""


def response(rule: str, name: str | None, address: str | None, port: int, *, registry: bool = False) -> bytes:
    """The whole HTTP answer."""
    host = name or address
    told = {
        "error": "egress_refused",
        "host": host,
        "port": port,
        "rule": rule,
        "detail": f"The egress policy of this sandbox refuses {host}:{port}: {refusals.why(rule)}.",
        "remedy": refusals.remedy(rule, name, address, port, registry=registry),
    }
    body = json.dumps(told, indent=1).encode() + b"\n"
    head = (
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def explain(place: Place, flow: Flow, guest: socket.socket, refused: Refused, *, registry: bool) -> None:
    """Tell a client why it is refused, in the protocol that it speaks; whatever it speaks, the connection is then over."""
    if refused.rule in refusals.UPSTREAM or refused.rule == "connections" or refused.mid_answer:
        return
    if place.explaining >= AT_ONCE:
        return
    place.explaining += 1
    try:
        opening = flow.opening or await _opening(guest, flow.port)
        if opening[:1] == bytes([TLS_HANDSHAKE]):
            await _farewell(guest, ACCESS_DENIED)
        elif REQUEST.match(opening):
            address = None if flow.address is None else str(flow.address)
            told = response(refused.rule, refused.name or flow.name, address, flow.port, registry=registry)
            await _farewell(guest, told.partition(b"{")[0] if opening.startswith(b"HEAD ") else told)
    finally:
        place.explaining -= 1


async def _opening(guest: socket.socket, port: int) -> bytes:
    """The first bytes that the client sends, if it is one that speaks first."""
    if port in refusals.WEB_PORTS:
        with contextlib.suppress(OSError), anyio.move_on_after(OPENING_S):
            return await asyncio.get_running_loop().sock_recv(guest, OPENING_MAX)
    return b""


async def _farewell(guest: socket.socket, answer: bytes) -> None:
    """Say a last thing and wait a moment for it to be taken: a reset must not overtake it."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError), anyio.move_on_after(FAREWELL_S):  # who asked may be gone
        await loop.sock_sendall(guest, answer)
        guest.shutdown(socket.SHUT_WR)
        while await loop.sock_recv(guest, 1 << 16):
            pass
