"""Whose turn comes first: the server's two processes need little of the CPU, but now.

Sandboxes that are busy take all there is. A call passes through the server several times, and would wait for its turn each time.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

NICE: Final = -10


def first(pid: int) -> None:
    """One of the server's own, with the threads and processes that it begins from now on. Where this user may say so."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICE)
        autogroup = Path(
            f"/proc/{pid}/autogroup"
        )  # where sessions are given equal parts, niceness counts within one alone
        if autogroup.exists():
            autogroup.write_text(str(NICE))


def like_everybody(pid: int) -> None:
    """What the server starts to do its work; it is in a session of its own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, 0)
