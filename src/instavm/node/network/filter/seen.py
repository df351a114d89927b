"""Where a sandbox went, or tried to: counted by destination and rule, bounded."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections import OrderedDict
from typing import Any, Final

from instavm.refusals import UPSTREAM

KEPT: Final = 512
"""Destinations; of more, those that were not seen for longest go."""

Key = tuple[str | None, str | None, int, str, bool, str]


class Refused(Exception):
    """A connection that does not come about, or not any further. `rule`: the word for it in the log.

    name: what the client asked for, where that is not what it looked up.
    """

    def __init__(self, rule: str, name: str | None = None) -> None:
        self.rule = rule
        self.name = name
        self.mid_answer = False
        """Some of an answer was passed on already, so that nothing can be said in between."""
        super().__init__(rule)


class Log:
    """`refusals`: where each refusal is told at once, to whoever wants to know; a full one loses the newest."""

    def __init__(self, refusals: socket.socket | None = None) -> None:
        self._refusals = refusals
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
        if not allowed and rule not in UPSTREAM and self._refusals is not None:
            with contextlib.suppress(OSError):
                self._refusals.send(json.dumps([name, address, port, protocol, rule, registry]).encode())

    def entries(self) -> list[list[Any]]:
        """Oldest first: the key's parts, count, first and last time, whether it is a registry."""
        return [[*key, *entry] for key, entry in self._entries.items()]
