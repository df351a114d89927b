"""What the kernel does with a guest's packets: hand them to the filter, or refuse them at once and count them.

The rules decide early, so that a refused connection is refused like one that nobody answers; they are not what keeps a
sandbox in. A namespace has no way out at all, and the filter looks at every connection again: without these rules
less gets through, not more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from instavm.contract.egress import Seen
from instavm.node.network.addresses import GATEWAY, GUEST, SPECIAL, STAND_INS
from instavm.node.network.kernel_log import GROUP, HEADERS_MAX
from instavm.node.network.policy import Policy, v4
from instavm.refusals import WEB_PORTS

TAP: Final = "tap0"
TCP_PORT: Final = 15001
UDP_PORT: Final = 15002
REFUSED_MAX: Final = 512
TABLE: Final = "inet egress"
PUBLIC: Final = f"ip daddr != {{ {', '.join(v4(SPECIAL))} }}"

BASE: Final = f"""
table {TABLE} {{
  set refused {{
    type ipv4_addr . inet_proto . inet_service
    flags dynamic, timeout
    timeout 1d
    size {REFUSED_MAX}
  }}
  chain allowed {{
  }}
  chain arrive {{
    type filter hook prerouting priority mangle; policy drop;
    iif lo accept
    iifname != {TAP} drop
    meta nfproto != ipv4 drop
    ip saddr != {GUEST} drop
    ip daddr {GATEWAY} meta l4proto {{ tcp, udp }} th dport 53 accept
    meta l4proto {{ tcp, udp }} jump allowed
    meta l4proto {{ tcp, udp }} update @refused {{ ip daddr . meta l4proto . th dport counter }}
    log group {GROUP} snaplen {HEADERS_MAX}
    meta l4proto tcp reject with tcp reset
    reject with icmp admin-prohibited
  }}
}}
"""


BASE_WITHOUT_LOG: Final = BASE.replace(f"    log group {GROUP} snaplen {HEADERS_MAX}\n", "")
"""For a kernel that has no such log."""


def allowing(policy: Policy) -> str:
    """Commands that put `policy` in the place of what was allowed before, all at once."""
    return "\n".join([f"flush chain {TABLE} allowed", *(f"add rule {TABLE} allowed {rule}" for rule in _rules(policy))])


def _rules(policy: Policy) -> Iterator[str]:
    tcp, udp = f"tproxy ip to :{TCP_PORT} accept", f"tproxy ip to :{UDP_PORT} accept"
    if ports := policy.name_ports():
        told = sorted({*ports, *WEB_PORTS})  # on these the filter can say why it refuses
        yield f"ip daddr {STAND_INS} tcp dport {_set(told)} {tcp}"
    if policy.cidrs or policy.open:
        yield f"ip daddr {STAND_INS} return"
    if cidrs := _set(v4(policy.cidrs)):
        yield f"ip daddr {cidrs} meta l4proto tcp {tcp}"
        yield f"ip daddr {cidrs} meta l4proto udp {udp}"
    if policy.open:
        yield f"{PUBLIC} tcp dport {_set(policy.ports)} {tcp}"


def _set(members: Any) -> str:
    return f"{{ {', '.join(map(str, members))} }}" if members else ""


LIST_REFUSED: Final = f"list set {TABLE} refused"


def refused(answer: str) -> list[Seen]:
    """What the kernel refused, out of nft's JSON."""
    found = []
    for one in json.loads(answer)["nftables"]:
        for element in one.get("set", {}).get("elem", ()):
            inner = element["elem"]
            address, protocol, port = inner["val"]["concat"]
            found.append(
                Seen(None, address, int(port), str(protocol), False, "no_rule", int(inner["counter"]["packets"]))
            )
    return found


LIST_ALL: Final = "list ruleset"


def in_force(answer: str) -> list[dict[str, Any]]:
    """What stands in the kernel, out of nft's JSON: without what the kernel counts and numbers, so that equal rules are equal."""
    return [
        {kind: {name: value for name, value in about.items() if name not in ("handle", "elem")}}
        for one in json.loads(answer)["nftables"]
        for kind, about in one.items()
        if kind != "metainfo"
    ]
