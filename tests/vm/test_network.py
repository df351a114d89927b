"""With no egress policy a sandbox reaches nothing: it has no network device at all."""

import pytest

pytestmark = pytest.mark.anyio


async def test_loopback_is_all_there_is(sandbox):
    assert (await sandbox.bash("ls /sys/class/net")).stdout == "lo\n"
    served = (
        "python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &\n"
        "curl -s --retry 60 --retry-connrefused --retry-delay 1 -o /dev/null -w '%{http_code}' localhost:8000"
    )
    assert (await sandbox.bash(served, timeout_s=120)).stdout == "200"


async def test_root_reaches_neither_the_internet_nor_the_host(sandbox):
    """Refused at once, not after a time-out."""
    for target in ("1.1.1.1 443", "169.254.169.254 80", "10.0.2.2 22", "8.8.8.8 53"):
        result = await sandbox.bash(f"timeout 20 bash -c '</dev/tcp/{target.replace(' ', '/')}'")
        assert result.exit_code == 1 and "unreachable" in result.stderr
    assert (await sandbox.bash("getent hosts example.com")).exit_code != 0
