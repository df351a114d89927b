"""Where output goes: terminals that lack characters, streams that are closed, readers that go away."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

PIPE: Final = 13
"""SIGPIPE, which Windows does not know."""
NOBODY_READS: Final = 128 + PIPE
"""Exit status when the reader of the output went away: as of a program that SIGPIPE ended."""


def prepare() -> None:
    """A character that the terminal lacks is shown as its escape; what goes to a closed stream goes nowhere."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (for the whole program)
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def give_up_output() -> None:
    """Nobody reads stdout any more: nothing is written to it, also not what waits to be when the program ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (as above)
    finally:
        os.close(nothing)


@contextmanager
def waiting(after_s: float, words: str, still: Callable[[], bool]) -> Iterator[None]:
    """On a terminal, say `words` when the block takes longer than `after_s` seconds and it is `still` true that it waits."""
    over = threading.Event()

    def say() -> None:
        if not over.wait(after_s) and still() and not over.is_set():
            sys.stderr.write(f"[instavm] {words}\n")
            sys.stderr.flush()

    if sys.stderr.isatty():
        threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        over.set()
