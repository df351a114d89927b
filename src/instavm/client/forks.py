"""What must not be shared with a forked process: connections, and locks that a thread of the parent may hold.

A process that was forked has copies of its parent's sockets. Were both to use one, each would read answers of the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakSet


class Forkable(Protocol):
    def after_fork(self) -> None:
        """In the child, before anything else runs there: begin anew."""


_forkable: WeakSet[Forkable] = WeakSet()
_streams: WeakSet[Any] = WeakSet()
_descriptors: set[int] = set()


def watch(one: Forkable) -> None:
    """Have `one.after_fork()` called in every forked process, for as long as somebody else holds `one`."""
    _forkable.add(one)


def connected(network_stream: Any) -> None:
    """Close the copy that a forked process gets of this connection; the connection itself goes on in the parent."""
    if network_stream is not None:
        _streams.add(network_stream)


@contextmanager
def private(*descriptors: int) -> Iterator[None]:
    """Within the block: close the copies that a forked process gets of these descriptors."""
    _descriptors.update(descriptors)
    try:
        yield
    finally:
        _descriptors.difference_update(descriptors)


def _in_child() -> None:
    sockets = [one.get_extra_info("socket") for one in list(_streams)]
    _replaced([one.fileno() for one in sockets if one is not None and one.fileno() >= 0])
    _streams.clear()
    for descriptor in _descriptors:
        with suppress(OSError):  # another thread of the parent was about to close it
            os.close(descriptor)
    _descriptors.clear()
    for one in list(_forkable):
        one.after_fork()


def _replaced(numbers: list[int]) -> None:
    """The objects that hold these descriptors may close them once more: so the numbers stay taken, by nothing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for number in numbers:
            os.dup2(nothing, number, inheritable=False)
    finally:
        os.close(nothing)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
