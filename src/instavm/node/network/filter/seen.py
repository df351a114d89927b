"""Where a sandbox went, or tried to: counted by destination and rule, bounded."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Any, Final

KEPT: Final = 512
"""Destinations; of more, those that were not seen for longest go."""

Key = tuple[str | None, str | None, int, str, bool, str]


class Refused(Exception):
    """A connection that does not come about, or not any further. `rule`: the word for it in the log.

    answer: what the guest is told in its own protocol, before the connection ends.
    """

    def __init__(self, rule: str, answer: bytes = b"") -> None:
        self.rule = rule
        self.answer = answer
        super().__init__(rule)


class Log:
    def __init__(self) -> None:
        self._entries: OrderedDict[Key, list[Any]] = OrderedDict()
        self.sent = self.received = 0

    def add(
        self,
        *,
        name: str | None = None,
        address: str | None = None,
        port: int,
        protocol: str = "tcp",
        allowed: bool,
        rule: str,
        registry: bool = False,
    ) -> None:
        now, key = time.time(), (name, address, port, protocol, allowed, rule)
        entry = self._entries.setdefault(key, [0, now, now, registry])
        entry[0] += 1
        entry[2] = now
        self._entries.move_to_end(key)
        if len(self._entries) > KEPT:
            self._entries.popitem(last=False)

    def entries(self) -> list[list[Any]]:
        """Oldest first: the key's parts, count, first and last time, whether it is a registry."""
        return [[*key, *entry] for key, entry in self._entries.items()]
