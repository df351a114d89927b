"""scripts/prepare.py: what it says when a step can't be done."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


@pytest.fixture
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", SCRIPTS / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_rights_it_names_what_is_missing_and_the_command(prepare, tmp_path, monkeypatch, capsys):
    listed = tmp_path / "packages.txt"
    listed.write_text("dpkg\nno-such-package-xyz\n")
    monkeypatch.setattr(prepare, "PACKAGE_LIST", listed)
    monkeypatch.setattr(prepare.os, "geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as ended:
        prepare.debian_packages()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Missing Debian packages: no-such-package-xyz\n" in said
    assert "apt-get update && apt-get install --yes --no-install-recommends no-such-package-xyz" in said


def test_packages_that_are_there_are_not_installed_again(prepare, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "_apt", lambda *_: pytest.fail("apt-get was run"))
    prepare.debian_packages()
    assert capsys.readouterr().err == "✓ Debian packages\n"


def test_an_archive_that_cannot_be_reached_is_said_to_be_that(prepare, capsys):
    with pytest.raises(SystemExit):
        prepare._run(["sh", "-c", "echo 'E: Failed to fetch x  Could not resolve y'; exit 100"], "advice")
    assert "package archive can't be reached" in capsys.readouterr().err


def test_another_failure_is_quoted_with_advice(prepare, capsys):
    with pytest.raises(SystemExit):
        prepare._run(["sh", "-c", "echo odd; exit 7"], "Try that.")
    said = capsys.readouterr().err
    assert "status 7" in said
    assert "odd\nTry that." in said


def test_exit_status_is_passed_on(prepare, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(prepare, "VENV", tmp_path)
    assert prepare.run_in_venv("python", "-c", "raise SystemExit(5)") == 5
    assert prepare.run_in_venv("python", "-c", "import os; os.kill(os.getpid(), 9)") == 137
