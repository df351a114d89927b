"""Threads that do one thing and end: one that has changed what the kernel gives it is good for nothing else.

And the system calls by which they change it, for which Python has no name.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LIBC = ctypes.CDLL(None, use_errno=True)


def in_thread(work: Callable[[], T]) -> T:
    """What `work` returns or raises, in a thread of its own. That begins in the namespaces of the one that calls."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as exc:
            answer.set_exception(exc)

    thread = threading.Thread(target=run, name="network")
    thread.start()
    thread.join()
    return answer.result()


def check(result: int, what: str) -> None:
    """Raises OSError: the call of LIBC that gave `result` failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
