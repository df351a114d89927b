"""Egress policies over the wire: `POST` and `GET` on `/v1/egress/{session|vm}/{id}`, and the log of what they let through."""

from __future__ import annotations

from ipaddress import IPv6Network, ip_network
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from instavm import hostnames, limits
from instavm.contract.egress import Egress
from instavm.wire.base import Asked, Timestamp, Wire

UNIQUE_LOCAL: Final = IPv6Network("fc00::/7")


def domain(text: str) -> str:
    """A host name, or `*.` and one, as DNS has it: lower case, ASCII, no dot at the end. Raises: ValueError."""
    below, name = ("*.", text.strip()[2:]) if text.strip().startswith("*.") else ("", text)
    try:
        return below + hostnames.read_typed(name)
    except hostnames.BadName as exc:
        raise ValueError(f"{exc} (address ranges belong in allowed_cidrs)") from None


def cidr(text: str) -> str:
    """An address range; a single address stands for itself.

    Sandboxes have IPv4 only. An IPv6 range has a meaning where it is private: names may then resolve into it.
    Raises: ValueError.
    """
    found = ip_network(text.strip())
    if isinstance(found, IPv6Network) and not found.subnet_of(UNIQUE_LOCAL):
        raise ValueError(
            "sandboxes have IPv4 only: of IPv6, only private ranges within fc00::/7 can be allowed, for names"
        )
    return str(found)


def _or_none(value: Any) -> Any:
    return [] if value is None else value


def _or_false(value: Any) -> Any:
    return False if value is None else value


def _once(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


Flag = Annotated[bool, BeforeValidator(_or_false), Field(strict=True)]
Domains = Annotated[
    list[Annotated[str, AfterValidator(domain)]],
    BeforeValidator(_or_none),
    Field(max_length=limits.EGRESS_RULES),
    AfterValidator(_once),
]
Cidrs = Annotated[
    list[Annotated[str, AfterValidator(cidr)]],
    BeforeValidator(_or_none),
    Field(max_length=limits.EGRESS_RULES),
    AfterValidator(_once),
]


class SetEgress(Asked):
    """What a sandbox may reach; what is left out is not allowed. The first flag has two names, of which the stricter holds."""

    allow_package_managers: Annotated[bool | None, Field(strict=True)] = None
    allow_public_repos: Annotated[bool | None, Field(strict=True)] = None
    allow_http: Flag = False
    allow_https: Flag = False
    allowed_domains: Domains = Field(default_factory=list)
    allowed_cidrs: Cidrs = Field(default_factory=list)

    def egress(self) -> Egress:
        given = [flag for flag in (self.allow_package_managers, self.allow_public_repos) if flag is not None]
        return Egress(
            packages=bool(given) and all(given),
            http=self.allow_http,
            https=self.allow_https,
            domains=tuple(self.allowed_domains),
            cidrs=tuple(self.allowed_cidrs),
        )


class EgressPolicy(Wire):
    """What is in force. `status`: `applied`, or `pending` while there is no sandbox that it could hold for."""

    allow_package_managers: bool
    allow_public_repos: bool
    allow_http: bool
    allow_https: bool
    allowed_domains: list[str]
    allowed_cidrs: list[str]
    status: str

    @classmethod
    def of(cls, egress: Egress, applied: bool) -> EgressPolicy:
        return cls(
            allow_package_managers=egress.packages,
            allow_public_repos=egress.packages,
            allow_http=egress.http,
            allow_https=egress.https,
            allowed_domains=list(egress.domains),
            allowed_cidrs=list(egress.cidrs),
            status="applied" if applied else "pending",
        )


class CheckEgress(Wire):
    """A destination, and the policy to try it under; without one, it is what is in force."""

    host: Annotated[str, Field(min_length=1, max_length=limits.HOST_CHARS)]
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 443
    protocol: Literal["tcp", "udp"] = "tcp"
    policy: SetEgress | None = None


class EgressCheck(Wire):
    """What the egress filter says about one destination.

    rule: what allows it, or why it is refused; `detail` says it in words.
    source: where that comes from: the policy of the `session`, of the `vm`, the `default` one, the `given` one; the
    `operator`'s setting; a `special_address`, the `control_plane`, the `network` as it is made, or `upstream` (it is
    allowed, but not there).
    remedy: how to have it allowed; None when it is. `applied`: whether this holds for a sandbox now.
    """

    host: str
    port: int
    protocol: str
    allowed: bool
    rule: str
    source: str
    detail: str
    remedy: str | None = None
    vm_id: str | None = None
    applied: bool


class EgressEntry(Wire):
    """One destination. `rule`: what allowed it, or why it was refused. `name` is None where only an address was given.

    `registry`: whether it is one of the image's package registries.
    """

    name: str | None = None
    address: str | None = None
    port: int
    protocol: str
    allowed: bool
    rule: str
    count: int
    first_at: Timestamp | None = None
    last_at: Timestamp | None = None
    registry: bool = False


class EgressLog(Wire):
    """Since the sandbox has its network, or its server was last started; bytes are those of allowed connections.

    Of one that has ended: what it was at its end.
    """

    vm_id: str
    entries: list[EgressEntry]
    bytes_sent: int
    bytes_received: int
    open_connections: int
