"""Whether a sandbox may reach something. The filter decides by it, and who asks what the filter would do is answered by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from instavm.node.network.addresses import STAND_INS, Address, Host, plain
from instavm.node.network.policy import NO_IPV6, NO_RULE, Policy, Verdict


@dataclass(frozen=True, slots=True)
class Decider:
    """What one sandbox goes by. `closed_ports`: ports of this host that are the control plane's."""

    policy: Policy
    host: Host
    closed_ports: frozenset[int]

    def verdict(self, name: str | None, address: Address | None, port: int, protocol: str = "tcp") -> Verdict:
        """Of a name as `hostnames.read` returns it, or of an address that was not looked up."""
        if name is not None:
            return self.policy.name(name, port) if protocol == "tcp" else NO_RULE
        assert address is not None, "there is a name or an address"
        address = plain(address)
        if address.version != 4:
            return NO_IPV6
        if address in STAND_INS:
            return NO_RULE  # one of no name
        verdict = self.policy.address(address, port, self.host, protocol)
        if verdict.allowed and self._is_control(address, port):
            return Verdict(False, "control_plane")
        return verdict

    def unfit(self, address: Address, port: int, verdict: Verdict) -> str | None:
        """Why what an allowed name resolved to may not be dialled; None when it may."""
        if self._is_control(address, port):
            return "control_plane"
        return self.policy.resolved(address, verdict, self.host)

    def fit(self, found: Iterable[Address], port: int, verdict: Verdict) -> tuple[list[Address], str]:
        """Of what an allowed name resolved to: what may be dialled, and when there is none, why."""
        why = {address: self.unfit(address, port, verdict) for address in found}
        return [one for one, rule in why.items() if rule is None], next(
            (rule for rule in why.values() if rule), "unresolved"
        )

    def _is_control(self, address: Address, port: int) -> bool:
        return port in self.closed_ports and self.host.has(address)
