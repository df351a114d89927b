"""What a policy allows, as a table; which addresses nothing opens by being broad; what the kernel is told."""

from ipaddress import ip_address

import pytest

from instavm.contract.egress import Egress
from instavm.node.network import rules
from instavm.node.network.addresses import never
from instavm.node.network.policy import Policy, Registry, from_wire, registry, to_wire
from instavm.node.registries import found, from_json, to_json

REGISTRIES = (Registry("index.test"), Registry("mirror.test", (80, 443, 8081)))


class Nowhere:
    """A host with one address."""

    def has(self, address):
        return str(address) == "192.0.2.9"


@pytest.mark.parametrize(
    ("egress", "name", "port", "rule"),
    [
        (Egress(), "a.test", 443, None),
        (Egress(packages=True), "index.test", 443, "packages"),
        (Egress(packages=True), "index.test", 80, "packages"),
        (Egress(packages=True), "index.test", 8081, None),
        (Egress(packages=True), "mirror.test", 8081, "packages"),
        (Egress(packages=True), "a.test", 443, None),
        (Egress(http=True, https=True), "a.test", 80, "http"),
        (Egress(http=True, https=True), "a.test", 443, "https"),
        (Egress(http=True, https=True), "a.test", 22, None),
        (Egress(https=True), "a.test", 80, None),
        (Egress(domains=("a.test",)), "a.test", 80, "domain"),
        (Egress(domains=("a.test",)), "a.test", 443, "domain"),
        (Egress(domains=("a.test",)), "a.test", 8080, None),
        (Egress(domains=("a.test",)), "x.a.test", 443, None),
        (Egress(domains=("*.a.test",)), "x.a.test", 443, "domain"),
        (Egress(domains=("*.a.test",)), "a.test", 443, None),
        (Egress(domains=("*.a.test",)), "xa.test", 443, None),
        (Egress(https=True, domains=("a.test",)), "a.test", 443, "domain"),
        (Egress(https=True, domains=("a.test",)), "a.test", 80, None),
        (Egress(https=True, domains=("a.test",)), "b.test", 443, None),
        (Egress(https=True, packages=True, domains=("a.test",)), "index.test", 80, "packages"),
        (Egress(https=True, cidrs=("10.0.0.0/8",)), "b.test", 443, None),
    ],
)
def test_names(egress, name, port, rule):
    verdict = Policy(egress, REGISTRIES).name(name, port)
    assert (verdict.rule if verdict.allowed else None) == rule
    assert verdict.inspect == (verdict.rule in ("packages", "domain") or (verdict.rule == "port" and verdict.inspect))


@pytest.mark.parametrize(
    ("egress", "address", "port", "rule"),
    [
        (Egress(http=True), "198.51.100.1", 80, "http"),
        (Egress(http=True), "198.51.100.1", 443, "port"),
        (Egress(http=True), "10.0.0.1", 80, "private"),
        (Egress(http=True), "169.254.169.254", 80, "private"),
        (Egress(http=True), "192.0.2.9", 80, "host"),
        (Egress(http=True, domains=("a.test",)), "198.51.100.1", 80, "no_rule"),
        (Egress(cidrs=("10.0.0.0/8",)), "10.2.3.4", 5432, "cidr"),
        (Egress(cidrs=("10.0.0.0/8",)), "11.2.3.4", 5432, "no_rule"),
        (Egress(cidrs=("0.0.0.0/0",)), "11.2.3.4", 5432, "cidr"),
        (Egress(cidrs=("0.0.0.0/0",)), "10.2.3.4", 5432, "private"),
        (Egress(cidrs=("192.0.2.0/24",)), "192.0.2.9", 22, "host"),
        (Egress(cidrs=("192.0.2.9/32",)), "192.0.2.9", 22, "cidr"),
        (Egress(cidrs=("192.0.0.1/32",)), "192.0.0.1", 22, "private"),
    ],
)
def test_addresses(egress, address, port, rule):
    verdict = Policy(egress).address(ip_address(address), port, Nowhere())
    assert verdict.rule == rule and verdict.allowed == (rule in ("http", "cidr"))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "0.0.0.0", "100.64.0.1", "172.31.0.1", "192.168.0.1", "224.0.0.1", "255.255.255.255"),
        *("::1", "::ffff:10.0.0.1", "fe80::1", "fc00::1", "ff02::1", "64:ff9b::a00:1", "2002:a00:1::", "2001::1"),
    ],
)
def test_addresses_that_are_never_public(address):
    assert never(ip_address(address), (), Nowhere()) == "private"


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111"])
def test_public_addresses(address):
    assert never(ip_address(address), (), Nowhere()) is None


def test_a_private_registry_is_reached_only_when_the_operator_named_it():
    policy = Policy(Egress(packages=True), [Registry("image.test"), registry("mirror.test:8081")])
    private = ip_address("10.0.0.1")
    assert policy.resolved(private, policy.name("image.test", 443), Nowhere()) == "private"
    assert policy.resolved(private, policy.name("mirror.test", 8081), Nowhere()) is None
    assert policy.resolved(ip_address("192.0.2.9"), policy.name("mirror.test", 8081), Nowhere()) == "host"


def test_the_kernel_hands_over_only_what_could_be_allowed():
    assert not [rule for rule in rules._rules(Policy(Egress())) if "tproxy" in rule]
    lines = list(
        rules._rules(Policy(Egress(domains=("a.test",), cidrs=("10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"))))
    )
    assert [line for line in lines if "tproxy" in line] == [
        "ip daddr 198.18.0.0/15 tcp dport { 80, 443 } tproxy ip to :15001 accept",
        "ip daddr { 10.0.0.0/8 } meta l4proto tcp tproxy ip to :15001 accept",
        "ip daddr { 10.0.0.0/8 } meta l4proto udp tproxy ip to :15002 accept",
    ]


def test_a_policy_is_the_same_behind_the_socket():
    policy = Policy(Egress(True, False, True, ("a.test",), ("10.0.0.0/8",)), REGISTRIES)
    again = from_wire(to_wire(policy))
    assert (again.egress, again.registries) == (policy.egress, policy.registries)


def test_registries_out_of_what_package_managers_say():
    urls = ["http://apt.test/debian", "https://user:secret@Index.test:8443/simple", "", "file:///opt/wheels"]
    urls += ["https://10.0.0.1/simple", "https://bad host/", "https://x:y:z/", "https://index.test/other"]
    registries = tuple(found(urls))
    assert registries == (Registry("apt.test"), Registry("index.test", (80, 443, 8443)))
    assert from_json(to_json(registries)) == registries
