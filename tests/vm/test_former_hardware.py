"""What a version before this one suspended goes on after the update, on the hardware that it was suspended on."""

from functools import partial

import probed
import pytest

from instavm.contract.executions import Command
from instavm.contract.sandboxes import SandboxSpec
from instavm.node import templates
from instavm.node.runtime import Runtime
from instavm.node.vmm.base import MachineSpec
from instavm.node.vmm.qemu import QemuDriver

pytestmark = pytest.mark.anyio
VIRTUALIZATION = Command("print({'svm', 'vmx'} & set(open('/proc/cpuinfo').read().split()))", "python", 60)


def a_version_before(monkeypatch):
    """It knew one revision of the hardware, and wrote no number of it into a template's description."""
    monkeypatch.setattr(templates, "MachineSpec", partial(MachineSpec, hardware=1))
    fingerprint = QemuDriver.fingerprint
    monkeypatch.setattr(QemuDriver, "fingerprint", lambda driver, hardware=1: fingerprint(driver, 1))
    dumps = templates.json.dumps
    without = lambda told, **how: dumps({name: told[name] for name in told if name != "hardware"}, **how)  # noqa: E731
    monkeypatch.setattr(templates, "json", type("Json", (), {"dumps": without, "loads": templates.json.loads}))


async def test_it_is_resumed_and_new_sandboxes_have_the_new_hardware(
    settings, short_folder, monkeypatch, anyio_backend
):
    own = probed.at(settings, short_folder / "former")
    with monkeypatch.context() as patch:
        a_version_before(patch)
        async with Runtime.open(own) as node:
            await node.start(SandboxSpec("vm-former", 1, 256))
            await node.execute("vm-former", Command("x = 42", "python", 60))
            await node.suspend("vm-former")
    async with Runtime.open(own) as node:
        await node.start(SandboxSpec("vm-former.1", 1, 256, resumes="vm-former"))
        assert (await node.execute("vm-former.1", Command("print(x)", "python", 60))).stdout == "42\n"
        assert "svm" in (await node.execute("vm-former.1", VIRTUALIZATION)).stdout
        await node.suspend("vm-former.1")
        await node.start(SandboxSpec("vm-former.2", 1, 256, resumes="vm-former.1"))
        assert (await node.execute("vm-former.2", Command("print(x)", "python", 60))).stdout == "42\n"
        await node.start(SandboxSpec("vm-new", 1, 256))
        assert (await node.execute("vm-new", VIRTUALIZATION)).stdout == "set()\n"
        for vm_id in ("vm-former.2", "vm-new"):
            await node.stop(vm_id)
        for name in await node.stored():
            await node.forget(name)
