"""How long something takes: once, again and again, and what the host itself takes for the least of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

FLOOR: Final = "floor: python3 -c on the host"
UNCOUNTED: Final = 10
"""Calls before the first that counts: until then caches fill and, under emulation, code is translated."""


def took_ms(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def repeated_ms(count: int, work: Callable[[], object], *, uncounted: int = UNCOUNTED) -> list[float]:
    """`count` times in ms, after `uncounted` others."""
    return [took_ms(work) for _ in range(uncounted + count)][uncounted:]


def floor_ms() -> float:
    """A new interpreter on the host, for a line of Python."""
    command = [sys.executable, "-c", "print(6 * 7)"]
    return took_ms(lambda: subprocess.run(command, check=True, capture_output=True))
