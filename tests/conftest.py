"""What every test shares: one event loop, one cache of images and templates, and proof that nothing is left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import probed
import pytest
from internet import internet

from instavm.settings import Settings

__all__ = ["internet"]


@pytest.fixture(scope="session")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def short_folder():
    """A folder with a short name: paths of Unix sockets end at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ivmt-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def settings(short_folder):
    """A node of its own, on the images and templates that all runs share (INSTAVM_CACHE_DIR moves them)."""
    few = {"spare_machines": 1, "spare_machines_max": 1}
    return probed.at(Settings(runtime_dir=short_folder / "run", **few), short_folder / "state")


def pytest_terminal_summary(terminalreporter):
    """Loudly, since a run without it looks as green as one with it."""
    for report in terminalreporter.stats.get("skipped", ()):
        if report.nodeid.startswith("tests/kvm/"):
            terminalreporter.section("THE KVM TIER WAS NOT TESTED", red=True, bold=True)
            terminalreporter.line(str(report.longrepr))
