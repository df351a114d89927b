"""The addresses inside, equal in every sandbox, and those outside that only a rule that names them opens."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

import psutil

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

GATEWAY: Final = "192.0.0.1"
GUEST: Final = "192.0.0.2"
PREFIX: Final = 30
"""Of 192.0.0.0/29, which RFC 7335 sets aside for links like this one: it clashes with nobody's network."""
LINK: Final = IPv4Network("192.0.0.0/29")
"""All of that range: in a sandbox it means the sandbox itself and its gateway, so no rule leads to anything else by it."""
GATEWAY_MAC: Final = "02:00:c0:00:00:01"
GUEST_MAC: Final = "02:00:c0:00:00:02"
STAND_INS: Final = IPv4Network("198.18.0.0/15")
"""What our DNS answers with: each allowed name has one of these in its sandbox, so a connection tells which name it means."""

SPECIAL: Final[tuple[Network, ...]] = tuple(
    ip_network(text)
    for text in (
        *("168.63.129.16/32", "fd00:ec2::/32"),  # services of clouds for their own machines: each means itself alone
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
        *("::/3", "4000::/2", "8000::/1", "2001::/23", "2002::/16", "3fff::/20"),
    )
)
"""Private, shared, link-local, loopback, multicast, translation and reserved ranges. Of IPv6 only 2000::/3 is public.

The first that holds an address counts.
"""
NAT64: Final = IPv6Network("64:ff9b::/96")
FRESH_S: Final = 1.0


def plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def embedded(address: Address) -> Iterable[IPv4Address]:
    """IPv4 addresses to which somebody on the way may translate an IPv6 one: NAT64, 6to4, Teredo."""
    if isinstance(address, IPv6Address):
        if address in NAT64:
            yield IPv4Address(int(address) & 0xFFFFFFFF)
        if address.sixtofour is not None:
            yield address.sixtofour
        yield from address.teredo or ()


def named(address: Address, special: Network, cidrs: Iterable[Network]) -> bool:
    """Whether a rule means this special range: one that lies in it, not one that happens to cover it (0.0.0.0/0)."""
    return any(
        address in cidr and cidr.version == special.version and cidr.subnet_of(special)  # type: ignore[arg-type]
        for cidr in cidrs
    )


class Host:
    """The addresses of this host, asked anew every second."""

    def __init__(self) -> None:
        self._asked_at = float("-inf")
        self._own: frozenset[Address] = frozenset()

    def has(self, address: Address) -> bool:
        """Whether a connection to it would end at this host: 0.0.0.0 is the host itself, too."""
        address = plain(address)
        if time.monotonic() - self._asked_at > FRESH_S:
            self._own, self._asked_at = frozenset(_own()), time.monotonic()
        return address in self._own or address.is_loopback or address.is_unspecified or _is_local(address)


def _own() -> Iterable[Address]:
    for found in psutil.net_if_addrs().values():
        for one in found:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                yield ip_address(one.address.partition("%")[0])


def _is_local(address: Address) -> bool:
    """Whether the kernel would deliver it to this host: then, and only then, it is its own source."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ip_address(probe.getsockname()[0]) == address
    except OSError:
        return False


def never(address: Address, cidrs: Iterable[Network], host: Host) -> str | None:
    """Why an address is out of reach though a rule covers it ("private", "host"); None when it is not."""
    cidrs = tuple(cidrs)
    address = plain(address)
    if address in LINK:
        return "private"
    if any(never(one, cidrs, host) is not None for one in embedded(address)):
        return "private"
    if host.has(address):
        return None if named(address, ip_network(str(address)), cidrs) else "host"
    for special in SPECIAL:
        if address in special:
            return None if named(address, special, cidrs) else "private"
    return None
