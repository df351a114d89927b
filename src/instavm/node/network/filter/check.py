"""What would become of a connection from a sandbox, decided as for one that came: by `Decider`."""

from __future__ import annotations

from ipaddress import ip_address

from instavm import hostnames
from instavm.contract.egress import EgressDecision
from instavm.node.network.addresses import Address
from instavm.node.network.decision import Decider
from instavm.node.network.filter.dial import Dialer
from instavm.node.network.filter.seen import Refused


async def check(decider: Decider, dialer: Dialer, host: str, port: int, protocol: str) -> EgressDecision:
    """host: a name or an address, as a program in the sandbox would give it. A name is looked up only if it may be."""
    if (address := _address(host)) is not None:
        verdict = decider.verdict(None, address, port, protocol)
        return EgressDecision(verdict.allowed, verdict.rule, None, str(address))
    try:
        name = hostnames.read(host)
    except hostnames.BadName:
        return EgressDecision(False, "bad_name", hostnames.shown(host))
    registry = name in decider.policy.registries
    verdict = decider.verdict(name, None, port, protocol)
    said = EgressDecision(verdict.allowed, verdict.rule, name, None, registry, verdict.private)
    if not verdict.allowed or dialer.proxy is not None:
        return said
    try:
        found = await dialer.resolve(name)
    except Refused as exc:
        return EgressDecision(False, exc.rule, name, None, registry)
    fit, why = decider.fit(found, port, verdict)
    if fit:
        return said
    return EgressDecision(False, why, name, str(found[0]) if found else None, registry)


def _address(text: str) -> Address | None:
    """An address in the one notation that no two programs read differently. Brackets are those of a URL."""
    try:
        return ip_address(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError:
        return None
