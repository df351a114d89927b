"""Holding the user's disk still while the host puts a snapshot below it."""

from __future__ import annotations

import fcntl
import os
import time

from instavm_guest.world import USER_ROOT

FREEZE_MAX_S = 5.0
"""Whatever becomes of the host: after so long the disk is let go."""
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h


class Disk:
    """The file system of the user's image. One of the agent's timers: a freeze ends by itself."""

    def __init__(self) -> None:
        self._root = os.open(USER_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._until: float | None = None

    def freeze(self) -> None:
        """Write out all that is in memory and let nobody write any more, until `thaw`. Raises OSError."""
        fcntl.ioctl(self._root, _FIFREEZE, 0)
        self._until = time.monotonic() + FREEZE_MAX_S

    def thaw(self) -> bool:
        """Let writers go on. False when they did already: what was to be held still was not."""
        if self._until is None:
            return False
        self._until = None
        fcntl.ioctl(self._root, _FITHAW, 0)
        return True

    def next_deadline(self) -> float | None:
        return self._until

    def expire(self, now: float) -> None:
        if self._until is not None and self._until <= now:
            self.thaw()
