"""A sandbox that is live on this node, and how it is known to be lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from instavm.errors import GuestProtocolError, OutcomeUnknown
from instavm.node.machines import Prepared


class Steps:
    """How long each step of a start took, in milliseconds, in order."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.ms: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.ms[name] = round((now - self._last) * 1000, 3)
        self._last = now


class Sandbox:
    """One that is live: its agent, and how it is told to end."""

    def __init__(self, vm_id: str, prepared: Prepared) -> None:
        self.vm_id = vm_id
        self.prepared = prepared
        self.agent = prepared.agent
        self.stop = anyio.Event()
        self.gone = anyio.Event()
        self.why: str | None = None
        self.over_disk = False
        self.at_rest = False
        self.saving = anyio.Lock()
        """Held while its disk or its memory is being saved: one at a time."""

    def lost(self, why: str) -> None:
        """It can't go on; the reason is kept for who asks. One that is being ended can't be lost any more."""
        if not self.stop.is_set():
            self.why = why
            self.stop.set()


@contextmanager
def told(sandbox: Sandbox) -> Iterator[None]:
    """A line that broke, or a guest that lies, is the end of its sandbox."""
    try:
        yield
    except OutcomeUnknown as exc:
        sandbox.lost(str(exc))
        raise
    except GuestProtocolError as exc:
        sandbox.lost(str(exc))
        raise OutcomeUnknown(f"the sandbox was ended while the command ran: {exc}") from exc
