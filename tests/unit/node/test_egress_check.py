"""What is answered about a destination before anybody goes there: by address, in every spelling, without a sandbox."""

import math
import socket
from ipaddress import ip_address

import pytest
from special import SPECIAL

from instavm.contract.egress import Egress, EgressDecision, Seen
from instavm.node.network.addresses import Host, never, plain
from instavm.node.network.decision import Decider
from instavm.node.network.filter.check import check
from instavm.node.network.filter.dial import Dialer
from instavm.node.network.policy import Policy, Registry, registry
from instavm.node.network.witness import Witness

pytestmark = pytest.mark.anyio
BROAD = (
    Egress(http=True, https=True),
    Egress(cidrs=("0.0.0.0/0",)),
    Egress(cidrs=("0.0.0.0/1", "128.0.0.0/1", "fc00::/7")),
)


def known(**names):
    """It has looked these up already."""
    dialer = Dialer((), None)
    dialer._kept = {name.replace("_", "."): (math.inf, tuple(map(ip_address, found))) for name, found in names.items()}
    return dialer


async def ask(egress, host, port=443, protocol="tcp", registries=(), closed_ports=(), dialer=None):
    decider = Decider(Policy(egress, registries), Host(), frozenset(closed_ports))
    return await check(decider, dialer or known(), host, port, protocol)


@pytest.mark.parametrize("address", SPECIAL)
async def test_no_broad_rule_opens_a_special_address(address):
    for egress in BROAD:
        for protocol in ("tcp", "udp"):
            for spelling in (address, f"[{address}]"):
                said = await ask(egress, spelling, 443, protocol)
                assert not said.allowed
                assert said.rule in (SPECIAL[address], "no_rule", "no_ipv6")
    found = plain(ip_address(address))
    cidrs = Policy(Egress(cidrs=("0.0.0.0/0", "::/0"))).cidrs
    assert never(found, cidrs, Host()) == SPECIAL[address], "nor where the range of a policy of old covers IPv6"


@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "10.0.0.1"])
def test_a_range_of_translated_addresses_does_not_open_what_they_are_translated_to(inside):
    number = int(ip_address(inside))
    translated = {"64:ff9b::/96": (0x64FF9B << 96) + number, "2002::/16": (0x2002 << 112) + (number << 80)}
    for cidr, address in translated.items():
        cidrs = Policy(Egress(cidrs=(cidr,))).cidrs
        assert never(ip_address(address), cidrs, Host()) == "private"


async def test_the_hosts_loopback_by_its_other_name_has_the_control_planes_ports_closed():
    for address in ("0.0.0.0", "127.0.0.1", "::ffff:127.0.0.1"):
        egress = Egress(cidrs=("0.0.0.0/32", "127.0.0.1/32"))
        assert (await ask(egress, address, 8000, closed_ports=[8000])).rule == "control_plane"
        assert (await ask(egress, address, 8001, closed_ports=[8000])).rule == "cidr"


@pytest.mark.parametrize(
    "host", ["0x7f.1", "2130706433", "017700000001", "127.1", "evil.test\0.a.test", "a test", "", "bücher.test"]
)
async def test_what_is_no_name_is_told_with_the_filters_word(host):
    assert (await ask(Egress(http=True, https=True), host)).rule == "bad_name"


@pytest.mark.parametrize(
    ("egress", "host", "port", "want"),
    [
        (Egress(), "a.test", 443, EgressDecision(False, "no_rule", "a.test")),
        (Egress(domains=("a.test",)), "A.test.", 443, EgressDecision(True, "domain", "a.test")),
        (Egress(domains=("a.test",)), "a.test", 22, EgressDecision(False, "port", "a.test")),
        (Egress(domains=("*.test",)), "inner.test", 443, EgressDecision(False, "private", "inner.test", "10.0.0.1")),
        (Egress(domains=("*.test",)), "none.test", 443, EgressDecision(False, "unresolved", "none.test")),
        (Egress(packages=True), "index.test", 443, EgressDecision(True, "packages", "index.test", None, True)),
        (Egress(packages=True), "own.test", 8081, EgressDecision(True, "packages", "own.test", None, True, True)),
        (Egress(), "index.test", 443, EgressDecision(False, "no_rule", "index.test", None, True)),
        (Egress(cidrs=("1.1.1.0/24",)), "1.1.1.1", 53, EgressDecision(True, "cidr", None, "1.1.1.1")),
        (Egress(https=True), "1.1.1.1", 443, EgressDecision(True, "https", None, "1.1.1.1")),
        (Egress(https=True), "2606:4700::1111", 443, EgressDecision(False, "no_ipv6", None, "2606:4700::1111")),
        (
            Egress(https=True, cidrs=("198.18.0.0/15",)),
            "198.18.0.1",
            443,
            EgressDecision(False, "no_rule", None, "198.18.0.1"),
        ),
    ],
)
async def test_the_answer(egress, host, port, want):
    dialer = known(
        a_test=["1.1.1.1"], inner_test=["10.0.0.1"], none_test=[], index_test=["1.1.1.1"], own_test=["10.0.0.2"]
    )
    registries = [Registry("index.test"), registry("own.test:8081")]
    assert await ask(egress, host, port, registries=registries, dialer=dialer) == want


async def test_names_are_reached_over_tcp_alone():
    assert (await ask(Egress(https=True), "a.test", protocol="udp")).rule == "no_rule"


def test_what_a_filter_tells_that_is_no_refusal_is_passed_over():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        with Witness(None, ours).watch() as refusals:
            for junk in (
                b"{",
                b"[]",
                b"7",
                b'[["a"],null,1,"tcp","no_rule",false]',
                b'["a",null,"1","tcp","no_rule",false]',
            ):
                theirs.send(junk)
            theirs.send(b'["a.test",null,53,"dns","no_rule",false]')
    assert refusals.seen() == (Seen("a.test", None, 53, "dns", False, "no_rule", 1),)
