"""The `instavm` command. Exit status: 0, 1 with `Error: …` on stderr, 128 and its number when a signal
ended it (130 after Ctrl-C), 141 when nobody reads the output; `exec` passes the code's on.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Without the extra that holds the command's libraries it says which one to install."""
    try:
        from instavm.cli.app import run  # noqa: PLC0415 (the libraries may be missing)
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"Error: the command line needs {exc.name}: pip install 'instavm-selfhosted[cli]'")
    sys.exit(run())
