"""DNS for a sandbox: names that its policy allows get a stand-in address, all others do not exist.

Nothing of a question goes any further but the name, and that only when it is allowed; CNAMEs are followed out there.
Of what can be asked, only addresses are answered: no HTTPS records, so no keys for an encrypted ClientHello either.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from typing import Final

import anyio
import anyio.abc
import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from instavm.node.network.filter.place import Place
from instavm.node.network.filter.seen import Refused

log = logging.getLogger(__name__)

TTL_S: Final = 60
MESSAGE_MAX: Final = 4096
AT_ONCE: Final = 16
PATIENCE_S: Final = 10.0
NAME: Final = re.compile(
    r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
)


async def over_udp(place: Place, tasks: anyio.abc.TaskGroup) -> None:
    loop, under_way = asyncio.get_running_loop(), 0

    async def one(question: bytes, asker: tuple[str, int]) -> None:
        nonlocal under_way
        try:
            if (said := await answer(place, question)) is not None:
                await loop.sock_sendto(place.names, said, asker)
        except OSError as exc:
            log.debug("an answer could not be sent: %s", exc)
        finally:
            under_way -= 1

    while True:
        question, asker = await loop.sock_recvfrom(place.names, MESSAGE_MAX)
        if under_way < AT_ONCE:  # in a flood, who asked will ask again
            under_way += 1
            tasks.start_soon(one, question, asker)


async def over_tcp(place: Place, tasks: anyio.abc.TaskGroup) -> None:
    loop, open_now = asyncio.get_running_loop(), set[socket.socket]()

    async def one(link: socket.socket) -> None:
        open_now.add(link)
        try:
            with anyio.move_on_after(PATIENCE_S):
                while (question := await _message(link)) is not None:
                    said = await answer(place, question)
                    if said is None:
                        break
                    await loop.sock_sendall(link, len(said).to_bytes(2) + said)
        except OSError as exc:
            log.debug("a question over TCP broke off: %s", exc)
        finally:
            open_now.discard(link)
            link.close()

    while True:
        link, _ = await loop.sock_accept(place.names_over_tcp)
        if len(open_now) < AT_ONCE:
            tasks.start_soon(one, link)
        else:
            link.close()


async def _message(link: socket.socket) -> bytes | None:
    loop, data, wanted = asyncio.get_running_loop(), b"", 2
    while len(data) < wanted:
        more = await loop.sock_recv(link, wanted - len(data))
        if not more:
            return None
        data += more
        if len(data) == 2 and wanted == 2:
            wanted = 2 + int.from_bytes(data)
    return data[2:]


async def answer(place: Place, question: bytes) -> bytes | None:
    """None: it cannot even be told that it cannot be understood."""
    try:
        asked = dns.message.from_wire(question, ignore_trailing=True)
        said = dns.message.make_response(asked, recursion_available=True)
    except (dns.exception.DNSException, ValueError):
        return None
    if len(asked.question) != 1 or asked.opcode() != 0:
        said.set_rcode(dns.rcode.REFUSED)
        return said.to_wire()
    one = asked.question[0]
    name = one.name.to_text(omit_final_dot=True).lower()
    said.set_rcode(await _look_up(place, name, one.rdclass))
    if said.rcode() == dns.rcode.NOERROR and one.rdtype == dns.rdatatype.A:
        stand_in = str(place.stand_in(name))
        said.answer.append(dns.rrset.from_text(one.name, TTL_S, dns.rdataclass.IN, dns.rdatatype.A, stand_in))
    return said.to_wire()


async def _look_up(place: Place, name: str, kind: dns.rdataclass.RdataClass) -> dns.rcode.Rcode:
    """Whether there is such a name, as far as this sandbox is concerned."""
    registry = name in place.policy.registries
    if kind != dns.rdataclass.IN or not NAME.fullmatch(name) or not place.policy.lookup(name):
        place.log.add(name=name[:253], port=53, protocol="dns", allowed=False, rule="no_rule", registry=registry)
        return dns.rcode.NXDOMAIN
    if place.dialer.proxy is not None:
        return dns.rcode.NOERROR
    try:
        found = await place.dialer.resolve(name)
    except Refused as exc:
        place.log.add(name=name, port=53, protocol="dns", allowed=False, rule=exc.rule, registry=registry)
        return dns.rcode.SERVFAIL
    if not found:
        place.log.add(name=name, port=53, protocol="dns", allowed=False, rule="unresolved", registry=registry)
        return dns.rcode.NXDOMAIN
    return dns.rcode.NOERROR
