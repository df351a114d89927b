"""What copies of a sandbox have of its network: nothing that was open, and a policy of their own (S3)."""

import pytest
from internet import Live

from instavm.contract.egress import Egress
from instavm.contract.sandboxes import SandboxSpec

pytestmark = pytest.mark.anyio

OPEN = "import socket; s = socket.create_connection(('{}', 9999), 10); s.sendall(b'one'); print(s.recv(9))"
ASK = "s.settimeout(10)\ntry:\n    s.sendall(b'two'); print(s.recv(9))\nexcept OSError as exc:\n    print('dead')"


async def test_an_open_connection_is_dead_in_the_copy_and_goes_on_in_the_parent(start, internet):
    """Also where the copy may reach the same place: it has to knock anew."""
    egress = Egress(cidrs=(f"{internet.a}/32",))
    parent = await start(egress)
    assert (await parent.python(OPEN.format(internet.a))).stdout == "b'one'\n"
    (made,) = await parent.node.fork(parent.vm_id, [SandboxSpec("vm-copy", 2, 512, egress=egress)])
    copy = Live(parent.node, made.vm_id)
    try:
        assert (await copy.python(ASK)).stdout in ("dead\n", "b''\n")
        assert (await copy.python(OPEN.format(internet.a))).stdout == "b'one'\n"
        await copy.allow()
        assert "Refused" in (await copy.python(OPEN.format(internet.a))).stderr
    finally:
        await copy.node.stop(copy.vm_id)
    assert (await parent.python(ASK)).stdout == "b'two'\n"
