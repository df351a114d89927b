"""The tools of a build: what is said when they are missing or fail, and that they end with the builder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from instavm.errors import DiskFull, HostNotReady
from instavm.node.images import workshop as tools


def test_a_missing_tool_names_its_debian_package(monkeypatch):
    monkeypatch.setattr(tools, "_where", lambda tool: None)
    with pytest.raises(HostNotReady, match=r"missing on this host: mksquashfs, mke2fs; .* e2fsprogs squashfs-tools"):
        tools.require("mksquashfs", "mke2fs")


def test_every_tool_that_is_asked_for_has_a_package(monkeypatch):
    """And every such package is in the list that scripts/start installs, or essential."""
    listed = (Path(__file__).parents[3] / "scripts" / "debian-packages.txt").read_text().split()
    assert set(tools._PROVIDERS.values()) - {"apt", "dpkg"} <= set(listed)


def test_a_tool_that_fails_is_quoted(workshop):
    with pytest.raises(HostNotReady, match=r"sh failed \(status 3\); its last lines:\nreason"):
        workshop.run("sh", "-c", "echo reason; exit 3")


def test_an_unreachable_archive_is_said_to_be_that(workshop):
    with pytest.raises(HostNotReady, match="the package archive could not be reached"):
        workshop.run("sh", "-c", "echo \"E: Failed to fetch x: Temporary failure resolving 'x'\"; exit 100")


def test_a_full_disk_is_said_to_be_that(workshop):
    with pytest.raises(DiskFull):
        workshop.run("sh", "-c", "echo 'cp: x: No space left on device' >&2; exit 1")


def test_every_line_is_progress_unless_quiet(workshop):
    lines: list[str] = []
    telling = tools.Workshop(workshop.folder, workshop.lock_fd, lines.append)
    assert telling.run("printf", "one\\n\\ntwo\\n") == "one\n\ntwo\n"
    telling.run("echo", "three", quiet=True)
    assert lines == ["one", "two"]


def test_an_isolated_tools_mounts_and_processes_end_with_it(workshop):
    script = "mount -t tmpfs none . && cd $PWD && touch inside && ls /proc | grep -c '^[0-9]'"
    assert int(workshop.run("sh", "-c", script, isolated=True)) < 6
    assert not (workshop.folder / "inside").exists()


def test_a_tool_does_not_see_the_builders_environment(workshop, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    seen = workshop.run("env")
    assert "s3cret" not in seen
    assert "https_proxy=http://proxy.invalid:3128" in seen


def test_without_root_it_says_how_to_get_on(monkeypatch):
    monkeypatch.setattr(tools.os, "geteuid", lambda: 1000)
    with pytest.raises(HostNotReady, match="takes root: run this once with sudo"):
        tools.check_host()


def test_when_the_builder_gives_up_everything_the_tool_started_is_gone_first(workshop):
    """What is removed next must not be written to any more."""

    def give_up(line: str) -> None:
        raise KeyboardInterrupt

    impatient = tools.Workshop(workshop.folder, workshop.lock_fd, give_up)
    with pytest.raises(KeyboardInterrupt):
        impatient.run("sh", "-c", "sleep 543 & echo started; wait", isolated=True)
    with pytest.raises(KeyboardInterrupt):
        impatient.run("sh", "-c", "sleep 543 & echo started; wait")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "sleep 543" not in listed.splitlines()
