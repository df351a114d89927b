"""What Firecracker is told is a pure function of the spec, and what it is started in one of its cell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from instavm.errors import HostNotReady
from instavm.node.jail import jailer
from instavm.node.jail.jailer import Cell
from instavm.node.vmm import firecracker, processor
from instavm.node.vmm.base import MachineSpec
from instavm.node.vmm.firecracker import FirecrackerDriver
from instavm.node.vmm.processor import CpuTemplate
from instavm.settings import Settings

SPEC = MachineSpec(Path("/k/bzImage"), Path("/i"), Path("/s"), vcpus=3, memory_mib=300)
CELL = Cell(Path("/bin/firecracker"), Path("/bin/jailer"), Path("/m/1"), 7, 99, ((Path("/t/memory"), "memory"),), 9)
SETTINGS = Settings(io_mib_per_s=2, io_operations_per_s=100, egress_mbit_per_s=8)


def told(network=None):
    return {path: body for _, path, body in firecracker.calls(SPEC, firecracker.disk_limits(SETTINGS), network)}


def test_the_machine_has_the_size_that_was_asked_for():
    machine = told()["/machine-config"]
    assert (machine["vcpu_count"], machine["mem_size_mib"]) == (3, 300)


def test_the_system_disk_is_read_only_and_no_disk_uses_io_uring():
    assert told()["/drives/system"]["is_read_only"] and not told()["/drives/root"]["is_read_only"]
    assert {told()[f"/drives/{name}"]["io_engine"] for name in ("system", "root")} == {"Sync"}


def test_the_disk_has_the_limits_of_the_settings():
    limiter = told()["/drives/root"]["rate_limiter"]
    assert limiter["bandwidth"] == {"size": 2 << 20, "refill_time": 1000}
    assert limiter["ops"] == {"size": 100, "refill_time": 1000}


def test_the_network_has_the_limits_of_the_settings_both_ways():
    limits = firecracker.network_limits(SETTINGS)
    assert (
        limits["rx_rate_limiter"]
        == limits["tx_rate_limiter"]
        == {"bandwidth": {"size": 1_000_000, "refill_time": 1000}}
    )
    assert firecracker.network_limits(SETTINGS.model_copy(update={"egress_mbit_per_s": None})) == {}


def test_a_network_device_is_there_only_for_a_spec_that_has_one_and_metadata_never():
    assert not any("network" in path or "mmds" in path for path in told())
    device = told({"host_dev_name": "tap0"})["/network-interfaces/net"]
    assert device["host_dev_name"] == "tap0"


def test_every_path_it_is_told_is_one_of_its_jail():
    """So a state that was saved in one jail can be loaded in any other."""
    paths = {body.get("path_on_host") for body in told().values()} | {told()["/boot-source"]["kernel_image_path"]}
    assert paths - {None} == {"/system", "/disk", "/kernel"}


def test_it_is_started_by_its_jailer_with_its_own_uid_in_the_namespace_of_its_network():
    command = jailer.arguments(CELL, 1234, {1: 5000, 7: 256})
    assert command[:2] == ["nsenter", "--net=/proc/self/fd/9"]
    assert command[command.index("--uid") + 1] == command[command.index("--gid") + 1] == "1234"
    assert "fsize=5000" in command and "no-file=256" in command
    assert jailer.arguments(replace(CELL, network=None), 1, {1: 1, 7: 1})[:2] == ["unshare", "--net"]


def test_a_firecracker_that_is_too_old_or_without_its_jailer_is_named(tmp_path):
    program = tmp_path / "firecracker"
    program.write_text("#!/bin/sh\necho 'Firecracker v1.7.0'\n")
    program.chmod(0o755)
    settings = SETTINGS.model_copy(update={"firecracker": program})
    with pytest.raises(HostNotReady, match="its jailer"):
        firecracker.installed_version(settings)
    (tmp_path / "jailer").write_text("#!/bin/sh\necho 'Jailer v1.7.0'\n")
    (tmp_path / "jailer").chmod(0o755)
    with pytest.raises(HostNotReady, match=r"1\.7\.0 is too old"):
        firecracker.installed_version(settings)


def installed(folder, version):
    for name in ("firecracker", "jailer"):
        (folder / name).write_text(f"#!/bin/sh\necho '{name.title()} v{version}'\n")
        (folder / name).chmod(0o755)
    return SETTINGS.model_copy(update={"firecracker": folder / "firecracker"})


@pytest.mark.parametrize(
    ("version", "named"),
    [
        *(("1.12.1", "CVE-2026-1386"), ("1.13.1", "CVE-2026-1386.*CVE-2026-5747"), ("1.13.9", "CVE-2026-5747")),
        *(("1.14.0", "CVE-2026-1386"), ("1.14.3", "CVE-2026-5747"), ("1.15.0", "CVE-2026-5747")),
    ],
)
def test_a_firecracker_with_a_known_hole_is_refused_by_its_name(tmp_path, version, named):
    settings = installed(tmp_path, version)
    with pytest.raises(HostNotReady, match=rf"{version} is refused: .*{named}.*1\.14\.4, 1\.15\.1"):
        firecracker.installed_version(settings)
    allowed = settings.model_copy(update={"known_bad_vmm": "allow"})
    assert firecracker.installed_version(allowed) == version


@pytest.mark.parametrize("version", ["1.14.4", "1.14.10", "1.15.1", "1.16.1", "2.0.0"])
def test_a_firecracker_without_one_is_taken(tmp_path, version):
    assert firecracker.installed_version(installed(tmp_path, version)) == version


def test_it_is_never_given_pci_devices():
    assert not any("pci" in word for word in jailer.arguments(CELL, 1234, {1: 5000, 7: 256}))
    assert "pci=off" in firecracker.KERNEL_ARGUMENTS


def test_a_cpu_template_of_firecrackers_own_is_told_with_the_size():
    told = {path: body for _, path, body in firecracker.calls(SPEC, {}, None, CpuTemplate.of("T2A"))}
    assert told["/machine-config"]["cpu_template"] == "T2A" and "/cpu-config" not in told


def test_without_a_cpu_template_all_but_virtualization_is_shown():
    told = {path: body for _, path, body in firecracker.calls(SPEC, {}, None, None)}
    assert "cpu_template" not in told["/machine-config"]
    assert cleared(told["/cpu-config"]) == {(0x1, "ecx", 5), (0x80000001, "ecx", 2)}


def test_a_cpu_template_of_the_operators_is_told_before_the_start_with_virtualization_cleared(tmp_path):
    file = tmp_path / "template.json"
    own = {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [{"register": "ecx", "bitmap": "0b1xxx_x1xx"}]}
    file.write_text(json.dumps({"cpuid_modifiers": [own], "msr_modifiers": []}))
    told = [(path, body) for _, path, body in firecracker.calls(SPEC, {}, None, CpuTemplate.of(str(file)))]
    assert all("cpu_template" not in body for _, body in told)
    (shown,) = (body for path, body in told if path == "/cpu-config")
    assert cleared(shown) == {(0x1, "ecx", 5), (0x80000001, "ecx", 2)}
    first = shown["cpuid_modifiers"][0]["modifiers"][0]["bitmap"]
    assert first == "0b" + "x" * 24 + "1x0xx1xx" and shown["msr_modifiers"] == []


def cleared(template):
    """Leaf, register and bit of all that a CPU template sets to 0."""
    return {
        (int(leaf["leaf"], 0), one["register"], 31 - at)
        for leaf in template["cpuid_modifiers"]
        for one in leaf["modifiers"]
        for at, bit in enumerate(one["bitmap"].removeprefix("0b"))
        if bit == "0"
    }


def test_a_state_that_was_saved_under_a_cpu_template_depends_on_it_and_not_on_the_host(tmp_path):
    file = tmp_path / "template.json"
    drivers = []
    for text in ("{}", '{"msr_modifiers": []}'):
        file.write_text(text)
        for wanted in (str(file), "T2"):
            drivers.append(FirecrackerDriver(SETTINGS.model_copy(update={"firecracker_cpu_template": wanted}), None))
    plain = FirecrackerDriver(SETTINGS, None)
    assert plain.processor() == processor.host()
    first, named, second, again = ((driver.processor(), driver.fingerprint()) for driver in drivers)
    assert named == again != first != second
    assert named[0].endswith("as CPU template T2") and named[1] != plain.fingerprint()


@pytest.mark.parametrize("text", [None, "no JSON", "[]"])
def test_a_cpu_template_that_is_none_is_refused_before_anything_starts(tmp_path, text):
    file = tmp_path / "template.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(HostNotReady, match="INSTAVM_FIRECRACKER_CPU_TEMPLATE"):
        CpuTemplate.of(str(file))
