"""How fast one API key may ask: a bucket of tokens for each."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from instavm.errors import RateLimitError

WHOLE: Final = 1 - 1e-9
"""A token, for sums of fractions that never quite make one."""
KEPT: Final = 4096
"""Buckets remembered; the one used longest ago is forgotten first, and would be full again by then."""


class Rates:
    """`per_s` tokens come back every second, up to `burst`; each request takes one."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> None:
        """Raises: RateLimitError, with the time after which there is a token again."""
        now = self._clock()
        tokens, seen = self._buckets.pop(name, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - seen) * self._per_s)
        self._buckets[name] = (tokens - 1 if tokens >= WHOLE else tokens, now)
        if len(self._buckets) > KEPT:
            self._buckets.popitem(last=False)
        if tokens < WHOLE:
            raise RateLimitError(
                f"more than {self._per_s:g} requests a second with one key", max(0.0, 1 - tokens) / self._per_s
            )
