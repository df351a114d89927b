"""What each confined process of ours can ask of the kernel's many kinds of sockets, and of its calls for other machines."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from instavm.border import confined

pytestmark = pytest.mark.anyio
PROGRAM = Path(__file__).with_name("families.py")
FOREIGN = {"x32": signal.SIGSYS, "i386": signal.SIGSYS, "io_uring": False}


async def test_a_vmm_makes_no_socket_at_all(run_jailed):
    said, status = await run_jailed(PROGRAM)
    assert status == 0, said
    assert json.loads(said) == {"made": [], **FOREIGN}


async def test_the_api_makes_pairs_of_its_own_only(own, capfd):
    with confined.confinement(own) as around:
        process, _ = around.start([sys.executable, "-I", str(PROGRAM)])
        assert process.wait(60) == 0
    assert json.loads(capfd.readouterr().out) == {"made": ["unix pair"], **FOREIGN}


async def test_the_egress_filter_makes_those_of_the_internet_and_asks_for_addresses():
    """Of netlink only the protocol that tells which addresses are the host's own, 0, which is not counted below."""
    done = subprocess.run([sys.executable, PROGRAM, "filter"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"made": ["inet", "inet6", "netlink", "unix pair"], **FOREIGN}


async def test_without_confinement_there_is_more_to_be_had():
    """So that the tests above can fail."""
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    told = json.loads(done.stdout)
    assert {"unix", "netlink", "packet"} <= set(told["made"]) and told["i386"] != signal.SIGSYS
