"""Being told to end: by Ctrl-C, by a closed terminal, by `kill` or a job's timeout. What is held is let go first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

NAMES: Final = ("SIGINT", "SIGTERM", "SIGHUP")
"""Windows has no SIGHUP."""


class Ended(BaseException):
    """A signal asks this program to end: raised where it is, once, so that `with` blocks let go of what they hold."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)

    @property
    def exit_status(self) -> int:
        return 128 + self.number


class _Signals:
    """Only the main thread handles signals."""

    def __init__(self) -> None:
        self.came: list[int] = []
        self.held = 0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The first one ends the program. A second Ctrl-C may be the same one, sent twice; the third one ends it at once."""
        self.came.append(number)
        if (len(self.came) == 1 and not self.held) or (number == signal.SIGINT and len(self.came) >= 3):
            raise Ended(number)


_signals = _Signals()


@contextmanager
def raised() -> Iterator[None]:
    """Within the block the signals raise `Ended`. One that is ignored, as under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals.came.clear()
    numbers = [signal.Signals[name] for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _signals.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[None]:
    """Within the block, which must be short, a signal waits: what is made there is known before the end begins."""
    _signals.held += 1
    try:
        yield
    finally:
        _signals.held -= 1
    if _signals.came and not _signals.held:
        raise Ended(_signals.came[0])
