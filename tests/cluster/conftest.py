"""Servers as users run them: processes of their own, which are killed and started again on the same state."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import NOTHING, Servers

from instavm.node import inventory


@contextmanager
def tidy(settings, short_folder):
    """Servers that have a folder of their own, of which nothing is left when the last of them has ended."""
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    servers = Servers(settings, folder)
    yield servers
    servers.end()
    assert inventory.take(folder) == NOTHING


@pytest.fixture
def servers(settings, short_folder):
    """None runs yet; the last one is ended by the fixture."""
    with tidy(settings, short_folder) as servers:
        yield servers


@pytest.fixture(scope="module")
def module_servers(settings, short_folder):
    """One that runs for all tests of a module, each of which ends its own sandboxes."""
    with tidy(settings, short_folder) as servers:
        servers.start()
        yield servers
