"""What a sandbox was refused while a command of its ran.

Kernel and filter tell of each refusal before the guest hears of it, into sockets of the sandbox's own. Nobody waits there: who
runs a command empties them before and after. So a command without refusals costs a few reads that find nothing.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from instavm.contract.egress import Seen
from instavm.node.network import kernel_log

KEPT: Final = 16
"""Destinations that one command is told of."""
AT_ONCE: Final = 2048
"""Messages read in one go; sockets hold fewer."""
MESSAGE_MAX: Final = 64 << 10
Key = tuple[str | None, str | None, int, str, str, bool]
"""Name, address, port, protocol, rule, whether it is a registry."""


class Refusals:
    """Counted by destination; of more than `KEPT`, the first."""

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}

    def add(self, key: Key) -> None:
        if key in self._counts or len(self._counts) < KEPT:
            self._counts[key] = self._counts.get(key, 0) + 1

    def seen(self) -> tuple[Seen, ...]:
        return tuple(
            Seen(name, address, port, protocol, False, rule, count, registry=registry)
            for (name, address, port, protocol, rule, registry), count in self._counts.items()
        )


class Witness:
    """Reads `kernel` (None: this kernel does not tell) and `filter_`; both belong to the sandbox's namespace."""

    def __init__(self, kernel: socket.socket | None, filter_: socket.socket) -> None:
        self._kernel = kernel
        self._filter = filter_
        self._watching: list[Refusals] = []

    @contextmanager
    def watch(self) -> Iterator[Refusals]:
        """Complete when the block has ended."""
        self._collect()
        refusals = Refusals()
        self._watching.append(refusals)
        try:
            yield refusals
            self._collect()
        finally:
            self._watching.remove(refusals)

    def _collect(self) -> None:
        for key in self._told():
            for one in self._watching:
                one.add(key)

    def _told(self) -> Iterator[Key]:
        for data in _messages(self._filter):
            yield from _key(data)
        for data in _messages(self._kernel) if self._kernel is not None else ():
            for address, port, protocol in kernel_log.read(data):
                yield None, address, port, protocol, "no_rule", False


def _key(data: bytes) -> Iterator[Key]:
    """Out of a message of the filter, which parses what hostile guests send: what is no such message is nobody's business."""
    try:
        name, address, port, protocol, rule, registry = json.loads(data)
    except (ValueError, TypeError):
        return
    texts = all(
        isinstance(one, str)
        for one in (protocol, rule, "" if name is None else name, "" if address is None else address)
    )
    if texts and isinstance(port, int) and isinstance(registry, bool):
        yield name, address, port, protocol, rule, registry


def _messages(line: socket.socket) -> Iterator[bytes]:
    for _ in range(AT_ONCE):
        try:
            data = line.recv(MESSAGE_MAX)
        except OSError:  # there is nothing more, or the sandbox has ended
            return
        if not data:
            return
        yield data
