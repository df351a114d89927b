"""What QEMU is started with is a pure function of the spec."""

from dataclasses import replace
from pathlib import Path

import pytest

from instavm.errors import HostNotReady
from instavm.node.vmm import qemu, tsc
from instavm.node.vmm.base import MachineSpec

LAYERS = (Path("/template/disk.qcow2"), Path("/image/rootfs"))
SPEC = MachineSpec(Path("/k"), Path("/i"), Path("/s"), vcpus=3, memory_mib=300)


@pytest.mark.parametrize(("acceleration", "cpu"), [("kvm", "host"), ("tcg", "max")])
def test_the_machine_has_the_size_that_was_asked_for(acceleration, cpu):
    arguments = qemu.machine(SPEC, acceleration)
    assert arguments[arguments.index("-smp") + 1] == "3"
    assert arguments[arguments.index("-m") + 1] == "300M"
    assert arguments[arguments.index("-cpu") + 1].startswith(cpu)


@pytest.mark.parametrize("acceleration", ["kvm", "tcg"])
def test_no_guest_is_given_virtualization_but_one_of_the_first_revision(acceleration):
    """What was saved by a version that gave it still needs the processor that its kernel has seen."""
    arguments = qemu.machine(SPEC, acceleration)
    assert arguments[arguments.index("-cpu") + 1].endswith(",svm=off,vmx=off")
    former = qemu.machine(replace(SPEC, hardware=1), acceleration)
    assert former[former.index("-cpu") + 1] == {"kvm": "host", "tcg": "max,la57=off"}[acceleration]


@pytest.mark.parametrize("hardware", [1, 2])
def test_no_disk_passes_scsi_requests_on(hardware):
    given = qemu.Descriptors(qmp=10, agent=11, system=12, layers=(13, 14))
    arguments = qemu.disks(replace(SPEC, hardware=hardware), Path("/home/disk.qcow2"), LAYERS, given)
    devices = [arguments[at + 1] for at, flag in enumerate(arguments) if flag == "-device"]
    assert len(devices) == 2 and all("scsi=off" in one for one in devices)


def test_a_revision_of_the_hardware_is_part_of_what_a_state_depends_on():
    driver = qemu.QemuDriver("tcg", None)
    assert driver.fingerprint() == driver.fingerprint(2) != driver.fingerprint(1)
    assert "svm" not in driver.fingerprint(1)


def test_only_a_template_being_made_writes_to_the_memory_file():
    """A restored machine maps it copy-on-write: its pages are shared until it writes them, and then they are its own."""
    assert "share=on" in qemu.memory(SPEC, "/m", share=True)[1]
    assert "share=off" in qemu.memory(SPEC, "/m", share=False)[1]


def test_the_system_disk_is_read_only_and_the_users_disk_is_an_overlay():
    given = qemu.Descriptors(qmp=10, agent=11, system=12, layers=(13, 14))
    arguments = qemu.disks(SPEC, Path("/home/disk.qcow2"), LAYERS, given)
    added = [arguments[at + 1] for at, flag in enumerate(arguments) if flag == "-add-fd"]
    assert added == ["fd=12,set=1", "fd=13,set=2", "fd=14,set=3"]
    system, root = (arguments[at + 1] for at, flag in enumerate(arguments) if flag == "-drive")
    assert "file=/dev/fdset/1" in system and "readonly=on" in system
    assert "file.filename=/home/disk.qcow2" in root and "driver=qcow2" in root


def test_the_layers_of_a_disk_are_named_by_us_and_not_by_the_disk():
    """A disk says which file it is an overlay of; a hostile one may say anything, and nobody asks it."""
    given = qemu.Descriptors(qmp=10, agent=11, system=12, layers=(13, 14))
    root = next(one for one in qemu.disks(SPEC, Path("/disk"), LAYERS, given) if "id=root" in one)
    assert ",backing.driver=qcow2,backing.node-name=layer-" in root
    assert ",backing.file.driver=file,backing.file.filename=/dev/fdset/2," in root
    assert ",backing.backing.driver=raw,backing.backing.node-name=layer-" in root
    assert "backing.backing.file.filename=/dev/fdset/3" in root
    assert given.all() == (10, 11, 12, 13, 14), "and all that it is given is known"


def test_no_device_is_there_that_nobody_asked_for():
    arguments = qemu.machine(SPEC, "tcg")
    for flag in ("-nodefaults", "-no-user-config", "-no-reboot"):
        assert flag in arguments
    assert "spawn=deny" in arguments[arguments.index("-sandbox") + 1]


def test_a_network_device_is_there_only_for_a_spec_that_has_one():
    assert qemu.network(SPEC, 7) == []
    arguments = qemu.network(replace(SPEC, network=True), 7)
    assert "tap,id=net,fd=7,vhost=off" in arguments and any("virtio-net-device" in one for one in arguments)


@pytest.mark.parametrize(
    ("said", "complaint"), [("5.2.0", "too old"), ("11.1.3", "too new"), ("weird", "can't be read")]
)
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
