"""Looking names up and connecting, on the host's side. What is checked is the very address that is then connected to."""

from __future__ import annotations

import asyncio
import base64
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import unquote, urlsplit

import anyio
import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.resolver
import h11

from instavm.node.network.addresses import Address, plain
from instavm.node.network.filter.seen import Refused

LOOKUP_S: Final = 8.0
CONNECT_S: Final = 10.0
KEPT_S: Final = 10.0
"""How long an answer is used again. Whoever changes theirs every second gains nothing: each dial checks what it dials."""
KEPT_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Upstream:
    """The operator's HTTP proxy."""

    host: str
    port: int
    authorization: str | None

    @classmethod
    def of(cls, url: str) -> Upstream:
        """Raises ValueError."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError("http://[user:password@]host:port is needed")
        given = None
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            given = "Basic " + base64.b64encode(pair.encode()).decode()
        return cls(parts.hostname, parts.port or 80, given)


class Dialer:
    def __init__(self, servers: Sequence[str], proxy: str | None) -> None:
        self._resolver = _resolver(servers) if servers else None
        self.proxy = Upstream.of(proxy) if proxy else None
        self._kept: dict[str, tuple[float, tuple[Address, ...]]] = {}

    async def resolve(self, name: str) -> tuple[Address, ...]:
        """Its addresses, IPv4 first, CNAMEs followed; none when there are none. Raises Refused."""
        kept = self._kept.get(name)
        if kept is not None and kept[0] > time.monotonic():
            return kept[1]
        try:
            with anyio.fail_after(LOOKUP_S):
                found = await (_by_host(name) if self._resolver is None else _by_servers(self._resolver, name))
        except (OSError, TimeoutError, dns.exception.DNSException) as exc:
            raise Refused("unresolved") from exc
        if len(self._kept) >= KEPT_MAX:
            self._kept.clear()
        self._kept[name] = (time.monotonic() + KEPT_S, found)
        return found

    async def connect(self, addresses: Sequence[Address], port: int) -> tuple[socket.socket, Address]:
        """To the first of them that answers. Raises Refused."""
        for address in addresses:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                with anyio.fail_after(CONNECT_S):
                    await asyncio.get_running_loop().sock_connect(one, (str(address), port))
                return one, address
            except (OSError, TimeoutError):
                one.close()
            except BaseException:
                one.close()
                raise
        raise Refused("unreachable")

    async def through_proxy(self, host: str, port: int) -> tuple[socket.socket, bytes]:
        """A tunnel, and what came behind the proxy's answer. Raises Refused."""
        assert self.proxy is not None, "there is a proxy"
        link, _ = await self.connect(await self.resolve(self.proxy.host), self.proxy.port)
        try:
            with anyio.fail_after(CONNECT_S):
                return link, await _tunnel(link, self.proxy, f"{host}:{port}")
        except (OSError, TimeoutError, h11.ProtocolError) as exc:
            link.close()
            raise Refused("proxy") from exc
        except BaseException:
            link.close()
            raise


async def _tunnel(link: socket.socket, proxy: Upstream, target: str) -> bytes:
    loop, talk = asyncio.get_running_loop(), h11.Connection(h11.CLIENT)
    headers = [("Host", target)]
    if proxy.authorization:
        headers.append(("Proxy-Authorization", proxy.authorization))
    ask = talk.send(h11.Request(method="CONNECT", target=target, headers=headers))
    await loop.sock_sendall(link, (ask or b"") + (talk.send(h11.EndOfMessage()) or b""))
    while True:
        event = talk.next_event()
        if event is h11.NEED_DATA:
            talk.receive_data(await loop.sock_recv(link, 1 << 16))
        elif isinstance(event, h11.Response):
            if not 200 <= event.status_code < 300:
                raise OSError(f"the proxy answered {event.status_code}")
            return bytes(talk.trailing_data[0])
        elif not isinstance(event, h11.InformationalResponse):
            raise OSError("the proxy hung up")


async def _by_host(name: str) -> tuple[Address, ...]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as exc:
        if exc.errno in (socket.EAI_NONAME, socket.EAI_NODATA):
            return ()
        raise
    except UnicodeError as exc:
        raise OSError(str(exc)) from exc
    return _sorted({plain(ip_address(str(place[0]).partition("%")[0])) for *_, place in found})


async def _by_servers(resolver: dns.asyncresolver.Resolver, name: str) -> tuple[Address, ...]:
    found: set[Address] = set()
    for kind in ("A", "AAAA"):
        try:
            answer = await resolver.resolve(name + ".", kind, search=False)
        except (dns.resolver.NoAnswer, dns.resolver.NXDOMAIN):
            continue
        found |= {plain(ip_address(record.address)) for record in answer}
    return _sorted(found)


def _sorted(addresses: set[Address]) -> tuple[Address, ...]:
    return tuple(sorted(addresses, key=lambda address: (address.version, int(address))))


def _resolver(servers: Sequence[str]) -> dns.asyncresolver.Resolver:
    """Raises ValueError."""
    resolver = dns.asyncresolver.Resolver(configure=False)
    places = [server.partition(":") for server in servers]
    resolver.nameservers = [dns.nameserver.Do53Nameserver(host, int(port or 53)) for host, _, port in places]
    resolver.lifetime = LOOKUP_S
    return resolver
