"""What the doctor says of a host: ok, missing or weaker, and what to do."""

import json

import pytest

from instavm.cli.app import run
from instavm.node import doctor
from instavm.node.vmm import choose, firecracker
from instavm.node.vmm.choose import Finding
from instavm.settings import Settings


@pytest.fixture
def own(tmp_path):
    for name in ("state", "run"):
        (tmp_path / name).mkdir()
    return Settings(state_dir=tmp_path / "state", runtime_dir=tmp_path / "run", firecracker=tmp_path / "firecracker")


def told(settings, name):
    return next(check for check in doctor.checks(settings) if check.name == name)


def installed(settings, version):
    for name in ("firecracker", "jailer"):
        program = settings.firecracker.with_name(name)
        program.write_text(f"#!/bin/sh\necho '{name.title()} v{version}'\n")
        program.chmod(0o755)


def test_a_firecracker_that_is_not_there_is_missing_but_needed_only_by_who_asks_for_it(own):
    check = told(own, "firecracker")
    assert (check.status, check.ok, check.remedy) == ("missing", True, firecracker.HOW_TO_GET)
    assert not told(own.model_copy(update={"driver": "firecracker"}), "firecracker").ok


def test_a_firecracker_with_a_known_hole_is_named_with_it(own):
    installed(own, "1.14.2")
    check = told(own, "firecracker")
    assert check.status == "missing" and "1.14.2 is refused: CVE-2026-5747" in check.detail
    parts = [one for one in doctor.checks(own.model_copy(update={"known_bad_vmm": "allow"})) if one.name == "VMM"]
    assert ("weaker", True) in [(one.status, "CVE-2026-5747" in one.detail) for one in parts]


def test_kvm_that_boots_nothing_is_weaker(own, monkeypatch):
    monkeypatch.setattr(choose, "closed", lambda: None)
    monkeypatch.setattr(choose, "recorded", lambda _: (Finding("qemu-kvm", False, "no guest boots", 8.0),))
    check = told(own, "qemu-kvm")
    assert (check.status, check.ok) == ("weaker", True) and "no guest boots" in check.detail
    monkeypatch.setattr(choose, "recorded", lambda _: (Finding("qemu-kvm", True, "a guest booted", 0.2),))
    assert told(own, "qemu-kvm").status == "ok"
    monkeypatch.setattr(choose, "closed", lambda: "/dev/kvm is not there")
    assert told(own, "kvm").status == "weaker"


@pytest.mark.parametrize(("module", "value", "status"), [("kvm_amd", "1", "weaker"), ("kvm_intel", "Y", "weaker")])
def test_a_host_whose_kvm_nests_is_told_how_to_stop_it(own, tmp_path, monkeypatch, module, value, status):
    place = tmp_path / module / "parameters" / "nested"
    place.parent.mkdir(parents=True)
    place.write_text(f"{value}\n")
    monkeypatch.setattr(choose, "MODULES", tmp_path)
    check = told(own, "nested virtualization")
    assert check.status == status and f"options {module} nested=0" in check.remedy
    shown = told(own.model_copy(update={"firecracker_cpu_template": "T2A"}), "nested virtualization")
    assert "sandboxes see it" in shown.detail and "are not shown" in check.detail
    place.write_text("0\n")
    assert "nested virtualization" not in {check.name for check in doctor.checks(own)}


def test_a_host_without_jails_is_weaker_and_something_to_be_done(own):
    check = told(own.model_copy(update={"jail": "off"}), "jail")
    assert (check.status, check.ok) == ("weaker", False)


def test_parts_are_told_with_their_age(own):
    names = {check.name: check.detail for check in doctor.checks(own)}
    assert "qemu 7." in names["VMM"] or "qemu" in names["VMM"]
    assert "days old" in names["VMM"] and "linux" in names["host kernel"]


def test_the_command_line_prints_the_word_and_json_has_it(own, monkeypatch, capsys):
    for name, value in (("STATE", own.state_dir), ("RUNTIME", own.runtime_dir)):
        monkeypatch.setenv(f"INSTAVM_{name}_DIR", str(value))
    monkeypatch.setenv("INSTAVM_FIRECRACKER", str(own.firecracker))
    run(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("missing firecracker: ") for line in lines)
    run(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["firecracker"]["status"] == "missing" and checks["python"]["status"] == "ok"
