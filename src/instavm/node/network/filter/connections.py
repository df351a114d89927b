"""TCP from a sandbox. The guest's connection ends here; where it goes on to, and whether, is decided here."""

from __future__ import annotations

import asyncio
import logging
import socket
from ipaddress import ip_address
from typing import Final

import anyio
import anyio.abc

from instavm import hostnames
from instavm.node.network.addresses import Address
from instavm.node.network.filter import denials, hello, web
from instavm.node.network.filter.place import Flow, Place, reset, ungrouped
from instavm.node.network.filter.seen import Refused
from instavm.node.network.policy import Verdict

log = logging.getLogger(__name__)

HEAD_S: Final = 15.0
"""How long a client may take to say whom it wants."""
ACCEPT_AGAIN_S: Final = 0.05


async def serve(place: Place, tasks: anyio.abc.TaskGroup) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            guest, _ = await loop.sock_accept(place.connections)
        except OSError as exc:  # out of descriptors, or the guest was faster: neither ends the others
            log.warning("a connection could not be taken: %s", exc)
            await anyio.sleep(ACCEPT_AGAIN_S)
            continue
        tasks.start_soon(_one, place, guest)


async def _one(place: Place, guest: socket.socket) -> None:
    """One connection, to its end. Whatever goes wrong with it is its own affair."""
    host, port = guest.getsockname()
    address: Address = ip_address(host)
    name = place.name_of(address)
    about = {"name": name, "address": None if name else host, "port": port}
    flow = Flow(name, None if name else address, port)
    try:
        verdict = place.decider.verdict(name, flow.address, port)
        if not verdict.allowed:
            raise Refused(verdict.rule)
        if len(place.flows) >= place.limits.connections:
            raise Refused("connections")
        place.flows.add(flow)
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        guest.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with flow.scope:
            await _pass(place, flow, guest, verdict)
            guest.close()  # both sides have said all; everywhere else it is cut
    except Refused as exc:
        registry = name in place.policy.registries
        place.log.add(**about, allowed=False, rule=exc.rule, registry=registry)
        await denials.explain(place, flow, guest, exc, registry=registry)
    except (OSError, TimeoutError) as exc:
        log.debug("a connection broke: %s", exc)
    except Exception:
        log.exception("a connection was given up")
    finally:
        place.flows.discard(flow)
        if guest.fileno() >= 0:
            reset(guest)


async def _pass(place: Place, flow: Flow, guest: socket.socket, verdict: Verdict) -> None:
    def allowed() -> None:
        registry = flow.name in place.policy.registries
        address = None if flow.name else str(flow.address)
        place.log.add(
            name=flow.name, address=address, port=flow.port, allowed=True, rule=verdict.rule, registry=registry
        )

    async def dial() -> tuple[socket.socket, bytes]:
        outside, early = await reach(place, flow, verdict)
        if (why := place.still(flow)) is not None:  # the policy changed while it was dialled
            reset(outside)
            raise Refused(why)
        return outside, early

    head = b""
    if verdict.inspect:
        assert flow.name is not None, "only names are looked at more closely"
        with anyio.fail_after(HEAD_S):
            head = flow.opening = await place.receive(guest)
            if head[:1] == bytes([hello.HANDSHAKE]):
                head = await _hello(place, guest, head, flow.name)
            elif head:
                head = await web.first_head(place, guest, head, flow.name)
        if not head:
            return
        if head[:1] != bytes([hello.HANDSHAKE]):
            await web.relay(place, guest, head, flow.name, dial, allowed)
            return
    outside, early = await dial()
    allowed()
    try:
        if head:
            await asyncio.get_running_loop().sock_sendall(outside, head)
        await splice(place, guest, outside, early)
        outside.close()
    finally:
        if outside.fileno() >= 0:
            reset(outside)


async def _hello(place: Place, guest: socket.socket, head: bytes, name: str) -> bytes:
    """All bytes of the ClientHello, once it is known to ask for `name`. Raises Refused."""
    try:
        while (said := hello.read(head)) is None:
            more = await place.receive(guest)
            if not more or len(head) > hello.HELLO_MAX:
                raise Refused("not_tls_or_http")
            head += more
    except hostnames.BadName as exc:
        raise Refused("bad_name") from exc
    except hello.Malformed as exc:
        raise Refused("not_tls_or_http") from exc
    if said.encrypted:
        raise Refused("encrypted_hello")
    if said.name != name:
        raise Refused("no_name" if said.name is None else "wrong_name")
    return head


async def reach(place: Place, flow: Flow, verdict: Verdict) -> tuple[socket.socket, bytes]:
    """A connection to where the flow goes, and what came on it already. Raises Refused, with why for the log."""
    dialer, private = place.dialer, verdict.rule == "cidr"
    if dialer.proxy is not None and not private:
        return await dialer.through_proxy(flow.name or str(flow.address), flow.port)
    if flow.name is None:
        assert flow.address is not None, "a flow has a name or an address"
        return (await dialer.connect([flow.address], flow.port))[0], b""
    fit, why = place.decider.fit(await dialer.resolve(flow.name), flow.port, verdict)
    if not fit:
        raise Refused(why)
    outside, flow.address = await dialer.connect(fit, flow.port)
    return outside, b""


async def splice(place: Place, guest: socket.socket, outside: socket.socket, early: bytes = b"") -> None:
    """Pass bytes both ways until both sides have ended. Raises OSError."""
    loop = asyncio.get_running_loop()

    async def up() -> None:
        while data := await place.receive(guest):
            await loop.sock_sendall(outside, data)
        outside.shutdown(socket.SHUT_WR)

    async def down() -> None:
        data = early
        while data := data or await loop.sock_recv(outside, 1 << 18):
            await place.send(guest, data)
            data = b""
        guest.shutdown(socket.SHUT_WR)

    with ungrouped():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(up)
            tasks.start_soon(down)
