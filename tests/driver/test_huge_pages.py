"""Guest memory in huge pages, where it was asked for: sandboxes run and are saved as with small ones, and none is kept."""

import re
from pathlib import Path

import pytest
from saved import parent_and_child, running

from instavm.contract.executions import Command
from instavm.contract.isolation import Tier
from instavm.errors import HostNotReady, NoCapacity
from instavm.node import doctor
from instavm.node.vmm import choose, memory
from instavm.node.vmm.qemu import QemuDriver

pytestmark = pytest.mark.anyio
POOL = memory.HUGE_PAGES / "nr_hugepages"


@pytest.fixture
def pool():
    """Makes the host's pool so large that this many are free in it."""
    before = memory.huge("nr")

    def enlarge(free):
        wanted = memory.huge("nr") - memory.huge("free") + memory.huge("resv") + free
        try:
            POOL.write_text(str(wanted))
        except OSError as exc:
            pytest.skip(f"this host's pool of huge pages stays as it is: {exc}")
        if memory.huge("nr") != wanted:
            pytest.skip(f"this host has no {wanted} huge pages")

    yield enlarge
    POOL.write_text(str(before))
    assert memory.huge("nr") == before, "none is in use any more"


@pytest.fixture
async def huge(driver, pool):
    """A driver of the test's own, since it keeps what it has made of a template."""
    if driver.name != QemuDriver.name:
        pytest.skip("only QEMU has them")
    made = QemuDriver("kvm" if driver.tier is Tier.KVM else "tcg", driver._jails, huge_pages=True)
    await made.version()
    yield made
    made.close()


def pages(template):
    return template.saved.spec.memory_mib // 2


async def test_a_guest_runs_in_them(huge, pool, settings, template, homes):
    pool(2 * pages(template))  # the template's, and those that a guest may write to
    async with running(huge, template, homes()) as (machine, agent):
        assert (await agent.execute(Command("print(len(bytearray(64 << 20)))", "python", 60))).stdout == f"{64 << 20}\n"
        status = Path(f"/proc/{machine.pid}/status").read_text()
        assert int(re.search(r"HugetlbPages:\s+(\d+) kB", status)[1]) >= 64 << 10
        told = {check.name: check for check in doctor.checks(settings.model_copy(update={"huge_pages": "on"}))}
        assert told["huge pages"].ok and told["huge pages"].detail.startswith(f"{memory.huge('nr')} of 2 MiB")


async def test_parent_and_child_go_on_from_the_same_moment_in_them(huge, pool, template, homes):
    pool(3 * pages(template))
    await parent_and_child(huge, template, homes)
    assert memory.huge("resv") == 0


async def test_who_finds_too_few_of_them_is_told(huge, pool, template, homes):
    home = homes()
    for there, refusal in ((pages(template) + 16, NoCapacity), (16, HostNotReady)):  # the template takes more than 16
        pool(there)
        with pytest.raises(refusal, match=r"raise vm.nr_hugepages, or set INSTAVM_HUGE_PAGES=off"):
            await huge.prepare(template.saved, home / "disk.qcow2", home, background=False)
        huge.close()


async def test_firecracker_is_not_asked_to(settings, driver):
    both = settings.model_copy(update={"driver": "firecracker", "huge_pages": "on"})
    with pytest.raises(HostNotReady, match="INSTAVM_HUGE_PAGES=off, or INSTAVM_DRIVER=qemu"):
        await choose.choose(both, driver._jails)
