"""Servers as users run them: processes of their own, which are killed and started again on the same state."""

import pytest
from servers import tidy


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
