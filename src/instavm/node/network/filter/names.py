"""DNS for a sandbox: names that its policy allows get a stand-in address, all others do not exist.

Nothing of a question goes any further but the name, and that only when it is allowed; CNAMEs are followed out there.
Of what can be asked, only addresses are answered: no HTTPS records, so no keys for an encrypted ClientHello either.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Final

import anyio
import anyio.abc
import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from instavm import hostnames, refusals
from instavm.node.network.filter.place import Place
from instavm.node.network.filter.seen import Refused

log = logging.getLogger(__name__)

TTL_S: Final = 60
MESSAGE_MAX: Final = 4096
AT_ONCE: Final = 16
PATIENCE_S: Final = 10.0


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
    said_name = one.name.to_text(omit_final_dot=True)
    try:
        name = hostnames.read(said_name)
    except hostnames.BadName:
        place.log.add(name=hostnames.shown(said_name), port=53, protocol="dns", allowed=False, rule="bad_name")
        return _refused(asked, said, "bad_name")
    rcode, rule = await _look_up(place, name, one.rdclass)
    if rule is not None:
        return _refused(asked, said, rule)
    said.set_rcode(rcode)
    if rcode == dns.rcode.NOERROR and one.rdtype == dns.rdatatype.A:
        stand_in = str(place.stand_in(name))
        said.answer.append(dns.rrset.from_text(one.name, TTL_S, dns.rdataclass.IN, dns.rdatatype.A, stand_in))
    return said.to_wire()


def _refused(asked: dns.message.Message, said: dns.message.Message, rule: str) -> bytes:
    """There is no such name: of all answers the one upon which programs stop asking. Who can read more is told more."""
    said.set_rcode(dns.rcode.NXDOMAIN)
    if asked.edns >= 0:
        why = f"InstaVM egress, {rule}: {refusals.why(rule)}"
        said.use_edns(0, options=[dns.edns.EDEOption(dns.edns.EDECode.PROHIBITED, why)])
    return said.to_wire()


async def _look_up(place: Place, name: str, kind: dns.rdataclass.RdataClass) -> tuple[dns.rcode.Rcode, str | None]:
    """Whether there is such a name, as far as this sandbox is concerned; by which rule it is refused, if it is."""
    registry = hostnames.of_service(name) in place.policy.registries

    def failed(rule: str) -> None:
        place.log.add(name=name, port=53, protocol="dns", allowed=False, rule=rule, registry=registry)

    if kind != dns.rdataclass.IN or not place.policy.lookup(name):
        failed("no_rule")
        return dns.rcode.NXDOMAIN, "no_rule"
    if place.dialer.proxy is not None:
        return dns.rcode.NOERROR, None
    try:
        found = await place.dialer.resolve(name)
    except Refused as exc:
        failed(exc.rule)
        return dns.rcode.SERVFAIL, None
    if not found:
        failed("unresolved")
        return dns.rcode.NXDOMAIN, None
    return dns.rcode.NOERROR, None
