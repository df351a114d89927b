"""The kernel's rules applied exactly: what they refuse is compared with Python's own arithmetic of addresses.

A frame is written into the sandbox's wire for each address; the kernel tells of each that it refuses.
"""

import contextlib
import os
import struct
from ipaddress import IPv4Address, ip_network

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from instavm.contract.egress import Egress
from instavm.errors import HostNotReady
from instavm.node.network import kernel_log, rules, space
from instavm.node.network.addresses import GATEWAY_MAC, GUEST, GUEST_MAC, STAND_INS
from instavm.node.network.policy import Policy

LAST = 0xFFFFFFFF
NO_CHECKSUMS = struct.pack("=BBHHHH", 2, 0, 0, 0, 0, 0)  # virtio_net_hdr with VIRTIO_NET_HDR_F_DATA_VALID


@pytest.fixture(scope="module")
def wire():
    made = space.make()
    yield made
    made.close()


def checksum(header):
    total = sum(struct.unpack(f"!{len(header) // 2}H", header))
    return ~(total + (total >> 16)) & 0xFFFF


def frame(address, port, protocol):
    body = (
        struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 80, 2, 1000, 0, 0)
        if protocol == 6
        else struct.pack("!HHHH", 4000, port, 8, 0)
    )
    target = IPv4Address(address).packed
    head = struct.pack("!BBHHHBBH4s4s", 69, 0, 20 + len(body), 0, 0, 64, protocol, 0, IPv4Address(GUEST).packed, target)
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    macs = bytes.fromhex((GATEWAY_MAC + GUEST_MAC).replace(":", ""))
    return NO_CHECKSUMS + macs + b"\x08\0" + head + body


def refused(wire, addresses, port=80, protocol=6):
    """Which of them the kernel refuses."""
    found = set()
    for address in addresses:
        os.write(wire.tap, frame(address, port, protocol))
        try:
            while True:
                found |= {int(IPv4Address(said)) for said, _, _ in kernel_log.read(wire.kernel_log.recv(65536))}
        except BlockingIOError:
            pass
    return found


def put(wire, **egress):
    policy = Policy(Egress(**egress))
    space.apply(wire, rules.allowing(policy))
    return policy


def around(network):
    first, last = int(network.network_address), int(network.broadcast_address)
    return {one for one in (first - 1, first, (first + last) // 2, last, last + 1) if 0 <= one <= LAST}


@st.composite
def ranges(draw):
    prefix = draw(st.integers(0, 32))
    base = draw(st.sampled_from([0, LAST, 0x0A000000, 0xC6120000, 0x7F000000, 0xE0000000]) | st.integers(0, LAST))
    return ip_network((base >> (32 - prefix) << (32 - prefix) if prefix else 0, prefix))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ranges(), min_size=1, max_size=12), st.integers(0, LAST), st.sampled_from([6, 17]))
@example([ip_network("0.0.0.0/0")], 0, 6)
@example([ip_network("0.0.0.0/0"), ip_network("10.0.0.0/8")], LAST, 17)
@example([ip_network("255.255.255.255/32")], 0, 6)
@example([ip_network("240.0.0.0/4"), ip_network("255.255.255.0/24")], LAST, 6)
@example([ip_network("128.0.0.0/1"), ip_network("0.0.0.0/1")], 0, 6)
@example([ip_network("10.0.0.0/9"), ip_network("10.128.0.0/9"), ip_network("10.0.0.0/8")], 0x0AFFFFFF, 6)
@example([ip_network("1.2.3.4/32"), ip_network("1.2.3.5/32"), ip_network("1.2.3.4/32")], 0, 17)
def test_ranges_are_applied_exactly(wire, cidrs, anywhere, protocol):
    put(wire, cidrs=tuple(map(str, cidrs)))
    probes = {anywhere}.union(*map(around, cidrs))
    want = {
        one for one in probes if IPv4Address(one) in STAND_INS or not any(IPv4Address(one) in cidr for cidr in cidrs)
    }
    assert refused(wire, probes, 9999, protocol) == want


def test_what_is_open_to_the_public_is_open_to_nothing_special(wire):
    put(wire, https=True)
    public = {"1.1.1.1", "8.8.8.8", "223.255.255.255", "198.20.0.0", "11.0.0.0", "168.63.129.17"}
    special = {"0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.31.255.255", "192.0.0.8"}
    special |= {"192.168.0.1", "198.18.255.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16"}
    numbers = {int(IPv4Address(one)) for one in public | special}
    stand_in = int(IPv4Address("198.18.255.1"))
    assert refused(wire, numbers, 443) == {int(IPv4Address(one)) for one in special} - {stand_in}
    assert refused(wire, numbers, 22) == numbers
    assert refused(wire, numbers, 443, 17) == numbers, "nothing but TCP"


def test_commands_that_fail_leave_the_rules_as_they_were_and_the_next_ones_work(wire):
    """All of a batch or nothing of it; and nothing of a failed one is left in what speaks to the kernel."""
    put(wire, cidrs=("10.0.0.0/8",))
    inside, outside = 0x0A000001, 0x0B000001
    for broken in ("add rule inet egress allowed nonsense", "add rule inet nothere allowed accept", "{", "add rule \0"):
        with pytest.raises(HostNotReady):
            space.apply(wire, f"flush chain {rules.TABLE} allowed\n{broken}")
        assert refused(wire, {inside, outside}) == {outside}
    put(wire, cidrs=("11.0.0.0/8",))
    assert refused(wire, {inside, outside}) == {inside}


def test_no_packet_of_any_other_kind_of_sender_passes(wire):
    """Refusals of what is no packet at all are not told of, and do no harm."""
    put(wire)
    for junk in (b"", b"\0" * 10, NO_CHECKSUMS + b"\xff" * 60, frame(1, 1, 6)[:40], NO_CHECKSUMS + b"\x45" * 1400):
        with contextlib.suppress(OSError):
            os.write(wire.tap, junk)
    assert refused(wire, {0x01010101}) == {0x01010101}
