"""pip, npm and apt install from wherever the image is set up to, with packages allowed and nothing else."""

import probed
import pytest
from internet import Live

from instavm.contract.egress import Egress
from instavm.contract.sandboxes import SandboxSpec
from instavm.node.runtime import Runtime

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
async def real(settings, short_folder, anyio_backend):
    """Sandboxes of a node that looks names up as its host does."""
    mine = probed.at(settings, short_folder / "packages", spare_machines=0)
    async with Runtime.open(mine) as node:

        async def start(egress):
            vm_id = f"vm-real{len(node._live)}"
            await node.start(SandboxSpec(vm_id, 2, 512, egress=egress))
            return Live(node, vm_id)

        yield start


async def test_small_packages_install(real):
    sandbox = await real(Egress(packages=True))
    pip = await sandbox.bash(
        "pip install --no-deps iniconfig && python3 -c 'import iniconfig; print(iniconfig.__file__)'", 240
    )
    assert pip.exit_code == 0, pip.stdout[-2000:] + pip.stderr[-2000:]
    npm = await sandbox.bash(
        "cd /tmp && npm install is-number && node -e \"console.log(require('is-number')(5))\"", 240
    )
    assert npm.stdout.endswith("true\n"), npm.stdout[-2000:] + npm.stderr[-2000:]
    apt = await sandbox.bash("apt-get update -q && apt-get install -yq --no-install-recommends hello && hello", 400)
    assert apt.stdout.endswith("Hello, world!\n"), apt.stdout[-2000:] + apt.stderr[-2000:]
    assert (await sandbox.get("https://example.com/")) == "curl 6"
    assert {one.rule for one in await sandbox.log() if one.allowed} == {"packages"}
    assert all(one.registry for one in await sandbox.log() if one.allowed)


async def test_without_the_flag_they_do_not(real):
    sandbox = await real(Egress())
    done = await sandbox.bash("pip install --no-deps --retries 0 iniconfig", 120)
    assert done.exit_code != 0
    assert [one for one in await sandbox.log() if one.registry and not one.allowed], (
        "and it is told that it is a registry"
    )
