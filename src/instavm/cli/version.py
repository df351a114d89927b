"""`instavm version`."""

from __future__ import annotations

import typer

from instavm.version import __version__


def version() -> None:
    print(__version__)


def asked(given: bool) -> None:
    """`instavm --version`."""
    if given:
        print(__version__)
        raise typer.Exit
