"""What a driver promises: boot, save, prepare, load, pause, resume, end. The same tests for every driver."""

import os
import re
import signal
from dataclasses import replace

import anyio
import pytest

from instavm.contract.executions import Command
from instavm.contract.isolation import Tier
from instavm.errors import BootFailed, HostNotReady
from instavm.node import identity
from instavm.node.agent import connected
from instavm.node.vmm import choose

pytestmark = pytest.mark.anyio
HELLO = Command("print('hello')", "python", 60)


@pytest.fixture
def home(homes):
    return homes()


@pytest.fixture
async def machine(driver, template, home):
    machine = await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)
    yield machine
    await machine.aclose()
    assert not os.path.exists(f"/proc/{machine.pid}")


async def usable(machine):
    async with connected(await machine.dial()) as agent:
        await agent.identify(identity.fresh("vm-x", {}))
        return (await agent.execute(HELLO)).stdout


async def test_a_prepared_machine_loads_and_runs(machine):
    async with connected(await machine.dial()) as agent:
        await machine.load()
        await agent.identify(identity.fresh("vm-x", {}))
        assert (await agent.execute(HELLO)).stdout == "hello\n"


async def test_code_is_refused_before_the_clone_has_an_identity(machine):
    """Fail closed, on the guest's side too."""
    async with connected(await machine.dial()) as agent:
        await machine.load()
        await agent.identify(identity.fresh("vm-x", {}))
        with pytest.raises(Exception, match="at least 32 bytes of entropy"):
            await agent.identify({**identity.fresh("vm-x", {}), "entropy": "00"})
        for refused in (agent.execute(HELLO), agent.assign(identity.assigned("vm-y", {}), machine.resume)):
            with pytest.raises(Exception, match="no identity of its own"):
                await refused


async def test_a_paused_machine_stands_still_and_goes_on_where_it_was(machine):
    async with connected(await machine.dial()) as agent:
        await machine.load()
        await agent.identify(identity.fresh("vm-x", {}))
        await agent.execute(Command("x = 1", "python", 60))
        await machine.pause()
        with anyio.move_on_after(1.0) as waited:
            await agent.execute(HELLO)
        assert waited.cancelled_caught, "a paused machine answered"
        await machine.resume()
        assert (await agent.execute(Command("print(x)", "python", 60))).stdout == "1\n"


async def test_the_line_can_be_dialled_again(machine):
    async with connected(await machine.dial()) as agent:
        await machine.load()
        await agent.identify(identity.fresh("vm-x", {}))
    assert await usable(machine) == "hello\n"


async def test_the_end_of_a_machine_is_seen_and_closing_twice_is_fine(machine):
    await machine.load()
    os.kill(machine.pid, signal.SIGKILL)
    with anyio.fail_after(10):
        assert await machine.wait() == -signal.SIGKILL
    assert not machine.alive
    await machine.aclose()
    await machine.aclose()


async def test_a_state_that_can_not_be_loaded_is_a_boot_failure(driver, template, home, short_folder):
    broken = short_folder / "broken-state"
    broken.write_bytes(template.saved.state.read_bytes()[:1000])
    saved = replace(template.saved, state=broken)
    machine = await driver.prepare(saved, home / "disk.qcow2", home, background=False)
    try:
        with pytest.raises(BootFailed):
            await machine.load()
    finally:
        await machine.aclose()


async def test_a_vmm_that_is_missing_says_how_to_get_it(driver, template, home, missing):
    with pytest.raises(HostNotReady, match=re.escape(missing)):
        await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)


async def test_a_vmm_that_stops_at_once_says_why(driver, template, home):
    (home / "disk.qcow2").write_bytes(b"this is no disk")
    with pytest.raises(BootFailed, match="not in qcow2 format"):
        await driver.prepare(template.saved, home / "disk.qcow2", home, background=False)


async def test_a_disk_that_is_missing_is_named(driver, template, home):
    with pytest.raises(HostNotReady, match="no-such-disk"):
        await driver.prepare(template.saved, home / "no-such-disk", home, background=False)


async def test_the_probe_tells_a_guest_that_boots_from_one_that_does_not(settings, driver, guest):
    """One boots, given its time; a deadline that nothing can keep is reported as such and leaves no process."""
    acceleration = "kvm" if driver.tier is Tier.KVM else "tcg"
    name, command = f"qemu-{acceleration}", choose.qemu_command(guest, acceleration)
    patient = settings.model_copy(update={"probe_timeout_s": 120.0})
    found = await choose.boots(name, command, patient)
    assert (found.works, found.words) == (True, f"a guest booted with {name}")
    hasty = settings.model_copy(update={"probe_timeout_s": 0.1})
    found = await choose.boots(name, command, hasty)
    assert not found.works and f"does not boot on it with {name} within" in found.words


@pytest.mark.parametrize(
    ("works", "chosen"),
    [
        ({"firecracker": True, "qemu-kvm": True}, ("firecracker", "kvm")),
        ({"firecracker": False, "qemu-kvm": True}, ("qemu", "kvm")),
        ({"firecracker": False, "qemu-kvm": False}, ("qemu", "emulated")),
    ],
)
async def test_the_best_driver_that_works_is_chosen_and_the_answer_is_remembered(
    settings, driver, monkeypatch, tmp_path, works, chosen
):
    asked = []

    async def ask(settings, guest):
        asked.append(guest)
        return tuple(choose.Finding(name, ok, f"{name} was asked", 0.2) for name, ok in works.items())

    monkeypatch.setattr(choose, "probe", ask)
    monkeypatch.setattr(choose, "KVM_DEVICE", tmp_path)  # something that is there and opens
    automatic = settings.model_copy(update={"acceleration": "auto", "driver": "auto", "state_dir": tmp_path})
    for _ in range(2):
        found, words = await choose.choose(automatic, driver._jails)
        assert (found.name, found.tier) == chosen
        assert "was asked" in words
    assert len(asked) == 1
