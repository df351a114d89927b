"""With no egress policy a sandbox reaches nothing, and is told so at once. What policies open: tests/net."""

import pytest

from instavm.node import doctor

pytestmark = pytest.mark.anyio


async def test_loopback_works_and_one_wire_leads_to_a_gateway(sandbox):
    assert (await sandbox.bash("ls /sys/class/net")).stdout == "eth0\nlo\n"
    assert (await sandbox.bash("ip -br -4 a; ip r; cat /etc/resolv.conf")).stdout.split() == [
        *("lo", "UNKNOWN", "127.0.0.1/8", "eth0", "UP", "192.0.0.2/30", "default", "via", "192.0.0.1", "dev", "eth0"),
        *("192.0.0.0/30", "dev", "eth0", "proto", "kernel", "scope", "link", "src", "192.0.0.2"),
        *("nameserver", "192.0.0.1"),
    ]
    served = (
        "python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &\n"
        "curl -s --retry 60 --retry-connrefused --retry-delay 1 -o /dev/null -w '%{http_code}' localhost:8000"
    )
    assert (await sandbox.bash(served, timeout_s=120)).stdout == "200"


async def test_root_reaches_neither_the_internet_nor_the_host(sandbox):
    """Refused at once, not after a time-out."""
    for target in ("1.1.1.1 443", "169.254.169.254 80", "10.0.2.2 22", "8.8.8.8 53", "192.0.0.1 22"):
        result = await sandbox.bash(f"timeout 20 bash -c '</dev/tcp/{target.replace(' ', '/')}'")
        assert result.exit_code == 1 and "refused" in result.stderr
    assert (await sandbox.bash("getent hosts example.com")).exit_code == 2


async def test_a_network_goes_with_its_sandbox(node, start):
    before = len(node._networks)
    sandbox = await start()
    network = node._live[sandbox.vm_id].prepared.network
    assert network.space.tap == -1, "only the VMM has the tap"
    await sandbox.stop()
    assert network.space.fd == -1 and not network.space.sockets
    assert len(node._networks) <= before + 1, "a spare machine may have been made"


def test_the_doctor_tells_of_the_network(settings):
    (check,) = [check for check in doctor.checks(settings) if check.name == "network"]
    assert check.ok and "can be given" in check.detail
