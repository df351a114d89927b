"""What a guest has to attack: its processor and its devices, read from the machine that runs."""

import re
from collections import Counter

import pytest
from saved import python, running

pytestmark = pytest.mark.anyio

VIRTUALIZATION = """
import os
flags = {word for line in open('/proc/cpuinfo') if line.startswith('flags') for word in line.split()}
print('sse2' in flags, sorted(flags & {'svm', 'vmx', 'npt', 'ept', 'nrip_save', 'vgif', 'vpid'}))
os.mknod('/tmp/kvm', 0o20666, os.makedev(10, 232))
for path in ('/dev/kvm', '/tmp/kvm'):
    try:
        os.open(path, os.O_RDWR)
        print('opened')
    except OSError as exc:
        print('refused')
"""
QEMU_DEVICES = {
    "virtio-mmio": 24,
    "virtio-blk-device": 2,
    "virtio-serial-device": 1,
    "virtserialport": 1,
    "ioapic": 2,
    "isabus-bridge": 1,
    "isa-serial": 1,
    "mc146818rtc": 1,
    "isa-pit": 1,
    "isa-i8259": 2,
    "acpi-ged-x86": 1,
    "fw_cfg_io": 1,
}
"""virtio-mmio: places for devices, of which those with one below it are taken."""
HOSTS_OWN = {"kvmvapic", "kvmclock", "kvm-apicview"}
"""Parts of an accelerator, without registers that a guest could reach where it is not used."""
FIRECRACKER_DEVICES = {
    *("drives", "vsock", "machine-config", "boot-source", "cpu-config", "logger", "metrics"),
    *("network-interfaces", "balloon", "entropy", "mmds-config", "pmem", "memory-hotplug"),
}
ABSENT = ("network-interfaces", "balloon", "entropy", "mmds-config", "pmem", "memory-hotplug")


async def test_no_guest_sees_virtualization_of_its_own(driver, template, homes):
    """What nesting would use beside `svm` is gone with it, but under Firecracker, which can only clear a flag by itself."""
    async with running(driver, template, homes()) as (_, agent):
        flags, *opened = (await python(agent, VIRTUALIZATION)).splitlines()
    assert "'svm'" not in flags and "'vmx'" not in flags and flags.startswith("True ")
    assert driver.name == "firecracker" or flags == "True []"
    assert opened == ["refused", "refused"]


async def test_the_devices_are_those_that_were_asked_for_and_no_others(driver, template, homes):
    """Asked of the VMM that runs: arguments say what was wanted, not what came of it."""
    async with running(driver, template, homes()) as (machine, _):
        if driver.name == "firecracker":
            told = (await machine._api._client.get("/vm/config")).json()
            assert {name for name, value in told.items() if value} <= FIRECRACKER_DEVICES - set(ABSENT)
            assert {drive["drive_id"]: drive["is_read_only"] for drive in told["drives"]} == {
                "system": True,
                "root": False,
            }
            assert len(told["drives"]) == 2
            return
        tree = await asked(machine, "info qtree")
        assert Counter(re.findall(r"dev: ([^,\s]+)", tree)) - Counter(HOSTS_OWN) == Counter(QEMU_DEVICES)
        assert await asked(machine, "info pci") in ("", "No PCI buses\r\n"), "no PCI, so nothing is plugged in either"
        disks = re.findall(r"^ +(config-wce|scsi|discard|write-zeroes) = (\w+)", tree, re.MULTILINE)
        off = [("config-wce", "false"), ("scsi", "false"), ("write-zeroes", "false")]
        assert sorted(disks) == sorted([*off, *off, ("discard", "false"), ("discard", "true")])


async def asked(machine, line):
    return await machine._monitor.execute("human-monitor-command", {"command-line": line})
