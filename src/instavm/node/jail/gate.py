"""Holds a program until its limits are in force, in such a way that a server that is killed meanwhile leaves nothing waiting.

Two pipes lead to the server. `held` waits on the first one in front of everything else: when the server dies, it reads the
end of the pipe, and exits. On the second one the program's number is told: the descriptor for writing is one for reading as
well, so that telling never fails for want of a listener (bubblewrap gives up then, and its child waits for it without end).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

GO = b"go\n"
_HELD = ("sh", "-c", 'read -r go || exit 1; exec "$@" </dev/null', "sh")


def held(command: Sequence[str]) -> list[str]:
    """`command`, once `GO` comes in on stdin; the end of stdin means that it never begins."""
    return [*_HELD, *command]


def is_held(command: Sequence[str]) -> bool:
    """Whether a process with that command line waits here."""
    return tuple(command[: len(_HELD)]) == _HELD


@dataclass(slots=True)
class Ends:
    """Two ends of a pipe, each -1 once it is closed."""

    reads: int
    writes: int

    def close_reads(self) -> None:
        if self.reads >= 0:
            os.close(self.reads)
            self.reads = -1

    def close_writes(self) -> None:
        if self.writes >= 0:
            os.close(self.writes)
            self.writes = -1


@contextmanager
def pipe(*, never_breaks: bool = False) -> Iterator[Ends]:
    """never_breaks: writing succeeds whether or not anybody reads; what is written is then gone with the pipe."""
    reads, writes = os.pipe()
    ends = Ends(reads, writes)
    try:
        if never_breaks:
            ends.writes = os.open(f"/proc/self/fd/{writes}", os.O_RDWR | os.O_CLOEXEC)
            os.close(writes)
        yield ends
    finally:
        ends.close_reads()
        ends.close_writes()
