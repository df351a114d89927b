"""HTTP/1.1 from a sandbox to a name: read and written anew request by request, so that each bears the name that was allowed.

What reaches the server is what we understood, in our own framing: a second request can't hide behind the first.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import h11

from instavm import hostnames
from instavm.node.network.filter.place import Place, ungrouped
from instavm.node.network.filter.seen import Refused

HEAD_MAX: Final = 64 << 10
CHUNK: Final = 1 << 18
ABSOLUTE: Final = re.compile(r"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
LINE: Final = re.compile(rb"([^ ]*) ([^ ]*)")
HOST: Final = re.compile(rb"(?im)^host:[ \t]*(.*?)[ \t\r]*$")
Dial = Callable[[], Awaitable[tuple[socket.socket, bytes]]]


async def first_head(place: Place, guest: socket.socket, head: bytes, name: str) -> bytes:
    """Read on until the first request's head is there and is one that may pass. Raises Refused."""
    while True:
        talk = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        talk.receive_data(head)
        event = _understood(talk)
        if event is not h11.NEED_DATA:
            _check(event, name)
            return head
        more = await place.receive(guest)
        if not more:
            raise Refused("not_tls_or_http")
        head += more


async def relay(
    place: Place, guest: socket.socket, head: bytes, name: str, dial: Dial, allowed: Callable[[], None]
) -> None:
    """Serve the guest until one side has enough. Raises Refused, OSError, and what `dial` raises."""
    down = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
    down.receive_data(head)
    outside: socket.socket | None = None
    try:
        while True:
            request = await _next(down, lambda: place.receive(guest))
            if isinstance(request, h11.ConnectionClosed):
                return
            _check(request, name)
            if outside is None or not _open_still(outside):
                if outside is not None:
                    outside.close()
                outside, _ = await dial()
                up = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX)
            allowed()
            try:
                switched = await _exchange(place, guest, down, outside, up, request)
            except Refused as exc:
                exc.mid_answer = True
                raise
            if switched:
                await _rest(place, guest, down, outside, up)
                return
            if down.our_state is not h11.DONE or down.their_state is not h11.DONE:
                return
            down.start_next_cycle()
            if up.our_state is h11.DONE and up.their_state is h11.DONE:
                up.start_next_cycle()
            else:
                outside.close()
                outside = None
    except h11.ProtocolError as exc:
        raise Refused("not_tls_or_http") from exc
    finally:
        if outside is not None:
            outside.close()


async def _exchange(
    place: Place,
    guest: socket.socket,
    down: h11.Connection,
    outside: socket.socket,
    up: h11.Connection,
    ask: h11.Request,
) -> bool:
    """One request and its answer. Returns: whether both sides go on to speak something else."""
    loop = asyncio.get_running_loop()

    async def out(event: Any) -> None:
        if data := up.send(event):
            await loop.sock_sendall(outside, data)

    async def back(event: Any) -> None:
        if data := down.send(event):
            await place.send(guest, data)

    async def body() -> None:
        while True:
            event = await _next(down, lambda: place.receive(guest))
            if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                return
            await out(h11.Data(event.data) if isinstance(event, h11.Data) else event)
            if isinstance(event, h11.EndOfMessage):
                return

    await out(h11.Request(method=ask.method, target=_path(ask), headers=ask.headers.raw_items()))
    switched = False
    with ungrouped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(body)
            while True:
                event = await _next(up, lambda: loop.sock_recv(outside, CHUNK))
                if isinstance(event, h11.ConnectionClosed):
                    raise OSError("the server hung up")
                if isinstance(event, h11.Response):
                    event = h11.Response(
                        status_code=event.status_code, headers=event.headers.raw_items(), reason=event.reason
                    )
                await back(event)
                switched = isinstance(event, h11.InformationalResponse) and event.status_code == 101
                if switched or isinstance(event, h11.EndOfMessage):
                    break
            if down.their_state is not h11.SEND_BODY:
                return switched
            tasks.cancel_scope.cancel()  # answered before all of it was sent: the connection can't go on
    return switched


async def _rest(
    place: Place, guest: socket.socket, down: h11.Connection, outside: socket.socket, up: h11.Connection
) -> None:
    from instavm.node.network.filter.connections import splice  # noqa: PLC0415 (each calls the other)

    early, _ = up.trailing_data
    sent, _ = down.trailing_data
    if sent:
        await asyncio.get_running_loop().sock_sendall(outside, sent)
    await splice(place, guest, outside, bytes(early))


async def _next(talk: h11.Connection, more: Callable[[], Awaitable[bytes]]) -> Any:
    while True:
        event = _understood(talk)
        if event is not h11.NEED_DATA:
            return event
        talk.receive_data(await more())


def _understood(talk: h11.Connection) -> Any:
    head = talk.trailing_data[0] if talk.their_state is h11.IDLE and talk.our_role is h11.SERVER else b""
    try:
        event = talk.next_event()
    except h11.RemoteProtocolError as exc:
        if talk.our_role is h11.CLIENT:
            raise OSError(f"the server speaks no HTTP: {exc}") from exc
        raise Refused(_unreadable(head)) from exc
    if event is h11.NEED_DATA and talk.their_state is h11.IDLE and _other_protocol(talk.trailing_data[0]):
        raise Refused("not_tls_or_http")  # h11 would wait for the rest of a head that never comes
    return event


def _other_protocol(head: bytes) -> bool:
    """Whether a whole first line is there and asks for nothing in HTTP, as that of an SSH client."""
    line, ended, _ = head.partition(b"\n")
    return bool(ended) and not line.rstrip().rpartition(b" ")[2].startswith(b"HTTP/")


def _open_still(outside: socket.socket) -> bool:
    """Whether a server that has nothing to say has not hung up either."""
    try:
        return bool(outside.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _check(request: Any, name: str) -> None:
    """Raises Refused."""
    if not isinstance(request, h11.Request):
        raise Refused("not_tls_or_http")
    for said in _said(request):
        try:
            host, _ = hostnames.read_authority(said)
        except hostnames.BadName as exc:
            raise Refused("bad_name", hostnames.shown(said)) from exc
        if request.method == b"CONNECT":
            raise Refused("connect", host)
        if host != name:
            raise Refused("wrong_name", host)


def _said(request: h11.Request) -> list[str]:
    """Every name that the request gives: in its target, then in its Host header. Raises Refused."""
    target = request.target.decode("latin-1")
    hosts = [value.decode("latin-1") for key, value in request.headers if key == b"host"]
    if request.method == b"CONNECT":
        return [target, *hosts]
    if not hosts:
        raise Refused("no_name")
    if (absolute := ABSOLUTE.fullmatch(target)) is not None:
        return [absolute[1], *hosts]
    if not target.startswith("/") and target != "*":
        raise Refused("not_tls_or_http")
    return hosts


def _unreadable(head: bytes) -> str:
    """The rule for a head that is no HTTP: whether that is because of a name in it."""
    line = LINE.match(head)
    method, target = (b"", "") if line is None else (line[1], line[2].decode("latin-1"))
    absolute = ABSOLUTE.fullmatch(target)
    named = target if method == b"CONNECT" else None if absolute is None else absolute[1]
    hosts = [value.decode("latin-1") for value in HOST.findall(head)]
    for said in hosts if named is None else [named, *hosts]:
        try:
            hostnames.read_authority(said)
        except hostnames.BadName:
            return "bad_name"
    return "not_tls_or_http"


def _path(request: h11.Request) -> bytes:
    """The target as servers expect it: without scheme and host."""
    absolute = ABSOLUTE.fullmatch(request.target.decode("latin-1"))
    if absolute is None:
        return bytes(request.target)
    rest = absolute[2].partition("#")[0].encode("latin-1")
    return rest if rest.startswith(b"/") else b"/" + rest
