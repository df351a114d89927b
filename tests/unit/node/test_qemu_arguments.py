"""What QEMU is started with is a pure function of the spec."""

from dataclasses import replace
from pathlib import Path

import pytest

from instavm.errors import HostNotReady
from instavm.node.vmm import qemu, tsc
from instavm.node.vmm.base import MachineSpec

SPEC = MachineSpec(Path("/k"), Path("/i"), Path("/s"), vcpus=3, memory_mib=300)


@pytest.mark.parametrize(("acceleration", "cpu"), [("kvm", "host"), ("tcg", "max")])
def test_the_machine_has_the_size_that_was_asked_for(acceleration, cpu):
    arguments = qemu.machine(SPEC, acceleration)
    assert arguments[arguments.index("-smp") + 1] == "3"
    assert arguments[arguments.index("-m") + 1] == "300M"
    assert arguments[arguments.index("-cpu") + 1].startswith(cpu)


def test_only_a_template_being_made_writes_to_the_memory_file():
    """A restored machine maps it copy-on-write: its pages are shared until it writes them, and then they are its own."""
    assert "share=on" in qemu.memory(SPEC, Path("/m"), share=True)[1]
    assert "share=off" in qemu.memory(SPEC, Path("/m"), share=False)[1]


def test_the_system_disk_is_read_only_and_the_users_disk_is_an_overlay():
    system, root = (qemu.disks(SPEC, Path("/home/disk.qcow2"))[n] for n in (1, 5))
    assert "file=/s" in system and "readonly=on" in system
    assert "file=/home/disk.qcow2" in root and "format=qcow2" in root


def test_no_device_is_there_that_nobody_asked_for():
    arguments = qemu.machine(SPEC, "tcg")
    for flag in ("-nodefaults", "-no-user-config", "-no-reboot"):
        assert flag in arguments
    assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]


def test_a_network_device_is_there_only_for_a_spec_that_has_one():
    assert qemu.network(SPEC, 7) == []
    arguments = qemu.network(replace(SPEC, network=True), 7)
    assert "tap,id=net,fd=7,vhost=off" in arguments and any("virtio-net-device" in one for one in arguments)


@pytest.mark.parametrize(("said", "complaint"), [("5.2.0", "too old"), ("weird", "can't be read")])
def test_a_qemu_that_is_too_old_or_odd_is_refused_with_the_remedy(tmp_path, monkeypatch, said, complaint):
    program = tmp_path / qemu.BINARY
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {said} (Debian)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostNotReady, match=complaint):
        qemu.installed_version()


def test_a_missing_qemu_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostNotReady, match="apt-get install qemu-system-x86"):
        qemu.installed_version()


def test_the_time_stamp_counter_is_measured_once_and_plausible():
    assert 500_000 < tsc.khz() < 10_000_000
    assert tsc.khz() == tsc.khz()
