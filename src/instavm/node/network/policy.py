"""What a policy allows. No I/O: the filter asks it about every connection, `rules.py` derives the kernel's rules from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, collapse_addresses, ip_network
from typing import Any, Final

from instavm import hostnames
from instavm.contract.egress import Egress
from instavm.node.network.addresses import Address, Host, never

HTTP: Final = 80
HTTPS: Final = 443


@dataclass(frozen=True, slots=True)
class Registry:
    """A host of packages. `trusted`: the operator named it, so it may be in a private network."""

    host: str
    ports: tuple[int, ...] = (HTTP, HTTPS)
    trusted: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rule`: what allows it, or why it is refused. `inspect`: what is said must bear the same name."""

    allowed: bool
    rule: str
    inspect: bool = False
    private: bool = False
    """Whether the name may resolve to private addresses."""


NO_RULE: Final = Verdict(False, "no_rule")
NO_IPV6: Final = Verdict(False, "no_ipv6")


class Policy:
    def __init__(self, egress: Egress, registries: Iterable[Registry] = ()) -> None:
        self.egress = egress
        self.registries = {one.host: one for one in registries}
        self.cidrs = tuple(ip_network(text) for text in egress.cidrs)
        self.ports = tuple(port for port, on in ((HTTP, egress.http), (HTTPS, egress.https)) if on)
        """What the two flags open, by themselves or for the names that are listed."""
        self.open = bool(self.ports) and not egress.domains and not egress.cidrs
        """Nothing is listed, so the flags hold for every public destination."""
        self._exact = frozenset(name for name in egress.domains if not name.startswith("*."))
        self._below = tuple(name[1:] for name in egress.domains if name.startswith("*."))

    def name_ports(self) -> tuple[int, ...]:
        """Every port on which some name may be reached."""
        listed = self.ports or (HTTP, HTTPS) if self.egress.domains else self.ports if self.open else ()
        registries = self.registries.values() if self.egress.packages else ()
        return tuple(sorted({*listed, *(port for one in registries for port in one.ports)}))

    def lookup(self, name: str) -> bool:
        """Whether a name may be asked for at all: a look-up is a message to whoever answers it."""
        return self.open or self._listed(name) or (self.egress.packages and name in self.registries)

    def name(self, name: str, port: int) -> Verdict:
        registry = self.registries.get(name) if self.egress.packages else None
        if registry is not None and port in registry.ports:
            return Verdict(True, "packages", inspect=True, private=registry.trusted)
        if self._listed(name):
            allowed = port in (self.ports or (HTTP, HTTPS))
            return Verdict(allowed, "domain" if allowed else "port", inspect=True)
        if self.open:
            allowed = port in self.ports
            return Verdict(allowed, ("http" if port == HTTP else "https") if allowed else "port")
        return Verdict(False, "port") if registry is not None else NO_RULE

    def address(self, address: Address, port: int, host: Host, protocol: str = "tcp") -> Verdict:
        """An address that was not looked up."""
        covered = any(address in cidr for cidr in self.cidrs)
        if not covered and not (self.open and protocol == "tcp"):
            return NO_RULE
        if (why := never(address, self.cidrs, host)) is not None:
            return Verdict(False, why)
        if covered:
            return Verdict(True, "cidr")
        allowed = port in self.ports
        return Verdict(allowed, ("http" if port == HTTP else "https") if allowed else "port")

    def resolved(self, address: Address, verdict: Verdict, host: Host) -> str | None:
        """Why an address that an allowed name resolved to may not be used; None when it may."""
        why = never(address, self.cidrs, host)
        return None if why == "private" and verdict.private else why

    def _listed(self, name: str) -> bool:
        return name in self._exact or name.endswith(self._below)


def registry(text: str) -> Registry:
    """One that the operator names: `host` or `host:port`. Raises ValueError."""
    host, port = hostnames.read_authority(text)
    return Registry(host, (HTTP, HTTPS) if port is None else (port,), trusted=True)


def to_wire(policy: Policy) -> dict[str, Any]:
    """For the filter's process."""
    egress = policy.egress
    return {
        "egress": [egress.packages, egress.http, egress.https, list(egress.domains), list(egress.cidrs)],
        "registries": [[one.host, list(one.ports), one.trusted] for one in policy.registries.values()],
    }


def from_wire(message: dict[str, Any]) -> Policy:
    packages, http, https, domains, cidrs = message["egress"]
    registries = [Registry(host, tuple(ports), trusted) for host, ports, trusted in message["registries"]]
    return Policy(Egress(packages, http, https, tuple(domains), tuple(cidrs)), registries)


def v4(cidrs: Iterable[object]) -> list[str]:
    """The IPv4 networks among them, none of which overlaps or adjoins another: a set of the kernel takes no other."""
    return [str(one) for one in collapse_addresses(cidr for cidr in cidrs if isinstance(cidr, IPv4Network))]
