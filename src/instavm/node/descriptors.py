"""How many descriptors this process may have."""

from __future__ import annotations

import resource


def allow_most() -> None:
    """All that it may ask for: a sandbox takes eleven, and the 1,024 that a shell gives are soon gone."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
