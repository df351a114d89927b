"""How a sandbox comes to be a copy of another, and how it is put to rest: what those who wait for that hold on to."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import anyio

from instavm.contract.node import Sandboxes
from instavm.contract.sandboxes import SandboxSpec, Started
from instavm.contract.snapshots import Stored
from instavm.errors import BootFailed, InstaVMError

log = logging.getLogger(__name__)

Birth = Callable[[SandboxSpec], Awaitable[Started]]


@dataclass(slots=True, eq=False)
class Rest:
    """One attempt to put a sandbox to rest. `over`: it is at rest, or `error` says why it goes on."""

    over: anyio.Event = field(default_factory=anyio.Event)
    error: InstaVMError | None = None
    stored: Stored | None = None


class Copies:
    """Several copies of one sandbox, made together; each of them waits here for its own."""

    def __init__(self, node: Sandboxes, parent_id: str) -> None:
        self._node = node
        self._parent_id = parent_id
        self._waiting: set[str] = set()
        self._made: dict[str, Started | InstaVMError] = {}
        self._over = anyio.Event()

    async def born(self, spec: SandboxSpec) -> Started:
        self._waiting.add(spec.vm_id)
        try:
            await self._over.wait()
        finally:
            self._waiting.discard(spec.vm_id)
        made = self._made[spec.vm_id]
        if isinstance(made, InstaVMError):
            raise made
        return made

    async def make(self, specs: Sequence[SandboxSpec]) -> None:
        try:
            made = await self._node.fork(self._parent_id, specs)
        except InstaVMError as exc:
            made = [exc] * len(specs)
        except Exception:
            log.exception("copying %s failed in a way that the node does not know", self._parent_id)
            made = [BootFailed(f"{self._parent_id} could not be copied: internal error")] * len(specs)
        self._made = {spec.vm_id: one for spec, one in zip(specs, made, strict=True)}
        for vm_id, one in self._made.items():
            if vm_id not in self._waiting and isinstance(one, Started):
                await self._node.stop(vm_id)  # nobody wants it any more
        self._over.set()
