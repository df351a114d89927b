"""What runs in a sandbox comes from Debian, whatever else the host's apt knows."""

from __future__ import annotations

import platform

import pytest

from instavm.errors import HostNotReady
from instavm.node.images import archive


def target(**fields: str) -> str:
    default = {
        "Created-By": "Packages",
        "Target-Of": "deb",
        "Origin": "Debian",
        "Architecture": "amd64",
        "Repo-URI": "http://mirror.invalid/debian/",
        "Release": "bookworm",
        "Component": "main",
        "Signed-By": "/keys/debian.gpg",
    }
    return "".join(f"{name}: {value}\n" for name, value in {**default, **fields}.items())


def changed(**fields: str) -> str:
    return target(**{name.replace("_", "-"): value for name, value in fields.items()})


def test_a_debian_source_is_taken_over_as_it_is():
    line = "deb [signed-by=/keys/debian.gpg] http://mirror.invalid/debian/ bookworm main"
    assert archive.debian_sources(target()) == [line]


@pytest.mark.parametrize(
    "other",
    [
        changed(Origin="Node Source"),
        changed(Origin="Debian Backports"),
        changed(Origin=""),
        changed(Architecture="arm64"),
        changed(Created_By="Translations"),
        changed(Target_Of="deb-src"),
    ],
)
def test_everything_else_is_left_out(other):
    assert archive.debian_sources("\n".join((other, target()))) == archive.debian_sources(target())


def test_a_source_is_listed_once():
    assert len(archive.debian_sources("\n".join((target(), target(), changed(Component="contrib"))))) == 2


def test_this_hosts_sources_are_found(workshop):
    found = archive.open_archive(workshop)
    assert found.suite == archive.suite()
    assert all(line.startswith("deb ") for line in found.sources)


def test_another_distribution_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "fedora", "PRETTY_NAME": "Fedora 40"})
    with pytest.raises(HostNotReady, match="built on Debian; this host is Fedora 40"):
        archive.suite()


def test_another_processor_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostNotReady, match="x86_64 only; this host is aarch64"):
        archive.suite()
