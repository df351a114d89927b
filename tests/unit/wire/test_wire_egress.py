"""An egress policy as it arrives: two names of one flag, names and ranges in one spelling, everything else refused."""

import pytest
from pydantic import ValidationError

from instavm.contract.egress import Egress
from instavm.wire.egress import EgressPolicy, SetEgress
from instavm.wire.vms import CreateVm


def test_what_is_left_out_is_not_allowed():
    assert SetEgress().egress() == Egress()
    assert SetEgress(allowed_domains=None, allowed_cidrs=None, allow_http=None).egress() == Egress()


@pytest.mark.parametrize(
    ("given", "packages"),
    [
        ({"allow_public_repos": True}, True),
        ({"allow_package_managers": True}, True),
        ({"allow_public_repos": True, "allow_package_managers": True}, True),
        ({"allow_public_repos": True, "allow_package_managers": False}, False),
        ({"allow_public_repos": False, "allow_package_managers": True}, False),
    ],
)
def test_the_stricter_of_two_names_holds(given, packages):
    assert SetEgress(**given).egress().packages is packages


def test_one_spelling():
    egress = SetEgress(
        allowed_domains=["API.Example.com.", "*.Example.com", "bücher.example", "api.example.com"],
        allowed_cidrs=["10.0.0.0/8", "192.0.2.7", "FD12::/32"],
    ).egress()
    assert egress.domains == ("api.example.com", "*.example.com", "xn--bcher-kva.example")
    assert egress.cidrs == ("10.0.0.0/8", "192.0.2.7/32", "fd12::/32")


NO_NAMES = (
    *("https://a.test", "a.test/x", "a.test:443", "*", "a.*.test", "*a.test", "10.0.0.1", "::1", "", "-a.test"),
    *("a" * 64 + ".test", "a..test", "a b.test", "1.2.3.4.5", 7),
    *(
        "0x7f.1",
        "2130706433",
        "017700000001",
        "[::1]",
        "a.test..",
        "a\0.test",
        "a\n.test",
        "a\t.test",
        "a%2etest",
        "u@a.test",
    ),
)
V6_RANGES = ("::/0", "2000::/3", "64:ff9b::/96", "::ffff:10.0.0.0/104", "fe80::/10", "2001:db8::/32")
NO_RANGES = ("10.0.0.1/8", "10.0.0.0/33", "host", "", "10.0.0.0-10.0.0.9", 7, *V6_RANGES)


@pytest.mark.parametrize(
    "given",
    [
        *({"allowed_domains": [one]} for one in NO_NAMES),
        *({"allowed_cidrs": [one]} for one in NO_RANGES),
        *({"allow_http": "yes"}, {"allow_https": 1}, {"allow_public_repos": "true"}),
        *({"allowed_domains": [f"a{n}.test" for n in range(257)]}, {"allowed_domains": "a.test"}),
    ],
)
def test_refused(given):
    with pytest.raises(ValidationError):
        SetEgress(**given)


def test_the_answer_has_every_field_and_both_names():
    answer = EgressPolicy.of(Egress(packages=True, domains=("a.test",)), "applied").model_dump()
    assert answer == {
        "allow_package_managers": True,
        "allow_public_repos": True,
        "allow_http": False,
        "allow_https": False,
        "allowed_domains": ["a.test"],
        "allowed_cidrs": [],
        "status": "applied",
    }


def test_a_vm_takes_the_same_policy():
    assert CreateVm(egress_policy={"allow_public_repos": True}).egress_policy.egress() == Egress(packages=True)
    assert CreateVm(egress_policy=None).egress_policy is None
