"""`instavm version`."""

from __future__ import annotations

from instavm.version import __version__


def version() -> None:
    print(__version__)
