import tempfile
from pathlib import Path

import pytest
from servers import NOTHING, Servers

from instavm.node import inventory


@pytest.fixture
def servers(settings, short_folder):
    folder = Path(tempfile.mkdtemp(dir=short_folder))
    servers = Servers(settings, folder)
    yield servers
    servers.end()
    assert inventory.take(folder) == NOTHING
