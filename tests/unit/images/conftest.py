from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from instavm.node.images import ImageStore
from instavm.node.images.workshop import Workshop
from instavm.settings import Settings


@pytest.fixture
def workshop(tmp_path: Path):
    """A place to run tools in, as a build has one."""
    fd = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield Workshop(tmp_path, fd)
    os.close(fd)


@pytest.fixture(scope="session")
def store() -> ImageStore:
    """The host's own cache: what isn't there is built, once."""
    settings = Settings()
    return ImageStore(settings.cache_dir, settings.disk_gib)
