"""Machines made ahead of time, in two stages, and machines that an earlier server left running.

A *spare* machine is a VMM process with overlay and sockets that waits for a template's state; nothing of a guest runs in it.
A *warm* one has been restored, has run once through everything that a first command takes, and is paused; it becomes
somebody only when it is taken. One loop per template compares how many there are with how many there should be.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import secrets
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.abc

from instavm.contract.executions import Command
from instavm.errors import DiskFull, GuestProtocolError, InstaVMError, NoCapacity
from instavm.node import identity, planted
from instavm.node.agent import Agent
from instavm.node.layers import Layers, overlay
from instavm.node.network.guard import Network, Networks
from instavm.node.network.policy import Registry
from instavm.node.network.witness import Refusals
from instavm.node.registries import from_json
from instavm.node.snapshots import pin
from instavm.node.templates import Template
from instavm.node.vmm.base import Driver, Machine, Saved
from instavm_guest.frames import PROTOCOL

log = logging.getLogger(__name__)

FREE_BYTES_MIN = 512 << 20
"""No sandbox is started when the disk has less left than this."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
WARM_MIB = 64
"""What a warm machine is taken to cost in the host's memory; measured in docs/performance.md."""
REHEARSAL = (Command("print(1)", "python", 20), Command("print(1)", "python", 20))
DEMAND_MEMORY_S = 60.0
"""Over how long the demand for a template is averaged; unused for a few times as long, its warm machines go."""
QUIET_S = 0.4
"""Machines are made ahead only after so long without a start: made during one, they cost it more than they save the next."""
ADOPT_S = 8.0
RECORD = "sandbox.json"

SYNC_S = 10.0
"""How long the agent of a machine that was saved while it ran may take to speak again."""

Stage = Literal["machine", "spare_machine", "warm_machine", "saved_machine"]


@dataclass(frozen=True, slots=True)
class Record:
    """Whose a machine is, beside it on disk."""

    vm_id: str
    cold: bool
    steps_ms: dict[str, float]
    template: str = ""
    """Empty in notes of versions that did not write it down: such a machine runs on, but can't be saved."""
    registries: list[list[Any]] = field(default_factory=list)
    protocol: int = 1
    """That its agent speaks; the first of them is that of notes which do not tell."""


def read_record(home: Path) -> Record | None:
    """None for a machine that never became anybody's."""
    try:
        return Record(**json.loads((home / RECORD).read_text()))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(slots=True)
class Prepared:
    """A machine with its folder and the line to its agent. `stage`: how far it was when it was asked for."""

    home: Path
    machine: Machine
    agent: Agent
    template: str
    """The key of what its memory is mapped from."""
    listen: Callable[[], None]
    """Begins to read what its agent says."""
    network: Network | None = None
    registries: tuple[Registry, ...] = ()
    """Of the template that it was made of."""
    stage: Stage = "machine"

    async def run(self) -> None:
        """Let the guest run; a warm one does when it becomes somebody. Raises BootFailed, OutcomeUnknown, TimeoutError."""
        if self.stage == "warm_machine":
            return
        await self.machine.load()
        if self.stage == "saved_machine":  # in the middle of whatever it was saying to somebody else
            await self.agent.sync(SYNC_S)
            self.listen()

    async def become(self, hostname: str, env: Mapping[str, str]) -> None:
        """Tell the guest who it is. Nothing of its user may run before. Raises as `Agent.identify`; BootFailed."""
        if self.stage == "warm_machine":
            await self.agent.assign(identity.assigned(hostname, env), self.machine.resume)
        else:
            await self.agent.identify(identity.fresh(hostname, env))

    def refusals(self) -> AbstractContextManager[Refusals]:
        """What its network refuses while the block lasts, complete when it has ended."""
        return nullcontext(Refusals()) if self.network is None else self.network.witness.watch()

    @property
    def disk(self) -> Path:
        """The uppermost layer: the only one that is written to."""
        (found,) = self.home.glob("disk*.qcow2")
        return found

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.machine.aclose()
            await self.agent.aclose()
            if self.network is not None:
                await self.network.aclose()
            await anyio.to_thread.run_sync(remove_home, self.home)

    async def detach(self) -> None:
        """Leave it running, for the server that comes next; until then it reaches nothing."""
        with anyio.CancelScope(shield=True):
            await self.agent.aclose()
            if self.network is not None:
                await self.network.aclose()
            await self.machine.detach()

    def record(self, about: Record) -> None:
        """Leave a note of what the next server must know to adopt it."""
        new = self.home / f".{RECORD}-{secrets.token_hex(4)}"
        planted.make_empty(new)
        new.write_text(json.dumps(asdict(about)))
        new.rename(self.home / RECORD)


@dataclass(slots=True)
class Shelf:
    """What is ready of one template, and how much of it is wanted."""

    spare: deque[Prepared] = field(default_factory=deque)
    warm: deque[Prepared] = field(default_factory=deque)
    changed: anyio.Event = field(default_factory=anyio.Event)
    rate: float = 0.0
    """Sandboxes asked for per second, averaged over DEMAND_MEMORY_S."""
    asked_at: float = 0.0
    refill_s: float = 0.5
    over: bool = False
    """Its image is gone."""

    def asked(self, now: float) -> None:
        self.rate = self.demand(now) + 1 / DEMAND_MEMORY_S
        self.asked_at = now
        self.changed.set()

    def demand(self, now: float) -> float:
        return self.rate * math.exp(-(now - self.asked_at) / DEMAND_MEMORY_S)


class Machines:
    def __init__(
        self,
        state_dir: Path,
        driver: Driver,
        networks: Networks,
        layers: Layers,
        *,
        spares: int,
        spares_max: int,
        warm_max: int,
        warm_memory_mib: int,
    ) -> None:
        self.folder = state_dir / "machines"
        self._layers = layers
        self._driver = driver
        self._networks = networks
        self._spares = spares
        self._spares_max = spares_max
        self._warm_max = min(warm_max, warm_memory_mib // WARM_MIB)
        self._shelves: dict[str, Shelf] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keeps machines ready for as long as the block lasts, and ends them with it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            async with anyio.create_task_group() as self._lines, anyio.create_task_group() as tasks:
                self._tasks = tasks
                yield
                tasks.cancel_scope.cancel()
                self._lines.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                for ready in self.prepared():
                    await ready.aclose()
                self._shelves.clear()

    async def take(self, template: Template) -> Prepared:
        """The furthest machine there is for this template. The caller closes it. Raises BootFailed, HostNotReady, DiskFull."""
        shelf = self._shelf(template)
        shelf.asked(time.monotonic())
        for ready in (shelf.warm, shelf.spare):
            while ready:
                found = ready.popleft()
                if found.machine.alive:
                    return found
                await found.aclose()
        return await self._prepare(template, background=False)

    def prepared(self) -> list[Prepared]:
        """The machines that wait, of all templates."""
        return [ready for shelf in self._shelves.values() for ready in (*shelf.warm, *shelf.spare)]

    async def restore(self, template: Template, saved: Saved, disk: str, owner: Path) -> Prepared:
        """A machine that goes on where `saved` was, on an overlay on the layer `disk`; its layers are those of `owner`.

        The caller closes it. Raises BootFailed, HostNotReady, DiskFull.
        """

        def furnish(home: Path) -> None:
            self._layers.share(owner, home)
            overlay(template.blank, self._layers.path(disk), home / "disk.qcow2")

        return await self._make(template, saved, furnish, "saved_machine", background=False)

    async def drop(self, key: str) -> None:
        """Nothing is started from this template any more: end what waits for that."""
        if (shelf := self._shelves.pop(key, None)) is not None:
            shelf.over = True
            shelf.changed.set()
            for ready in (*shelf.warm, *shelf.spare):
                await ready.aclose()

    async def adopt(self, pid: int, home: Path, record: Record) -> Prepared:
        """A machine that an earlier server left running in `home`.

        Raises BootFailed, OutcomeUnknown, TimeoutError; GuestProtocolError: its agent is one that this version can't talk to.
        When it raises, the machine has been ended.
        """
        machine = await self._driver.adopt(pid, home)
        try:
            if record.protocol != PROTOCOL:
                raise GuestProtocolError(f"its agent speaks protocol {record.protocol}, this server {PROTOCOL}")
            agent = Agent(await machine.dial())
            await agent.sync(ADOPT_S)
            self._lines.start_soon(agent.run)
            network = await self._networks.adopt(pid)
            return Prepared(home, machine, agent, record.template, _nothing, network, from_json(record.registries))
        except BaseException:
            await machine.aclose()
            raise

    def _shelf(self, template: Template) -> Shelf:
        if template.key not in self._shelves:
            self._shelves[template.key] = shelf = Shelf()
            self._tasks.start_soon(self._keep, template, shelf)
        return self._shelves[template.key]

    async def _keep(self, template: Template, shelf: Shelf) -> None:
        while not shelf.over:
            shelf.changed = anyio.Event()
            with anyio.move_on_after(QUIET_S):
                await shelf.changed.wait()
                continue  # the next start has come already: leave the CPUs to it
            try:
                await self._close_the_gap(template, shelf)
            except InstaVMError as exc:  # the edge of this task: whoever asks for a machine next is told the same
                log.warning("no machine could be made ahead of time: %s", exc)
            with anyio.move_on_after(DEMAND_MEMORY_S if shelf.warm or len(shelf.spare) > self._spares else None):
                await shelf.changed.wait()

    async def _close_the_gap(self, template: Template, shelf: Shelf) -> None:
        while len(shelf.warm) > self._warm_wanted(shelf):
            await shelf.warm.pop().aclose()
        while len(shelf.spare) > self._spares_wanted(shelf):
            await shelf.spare.pop().aclose()
        while len(shelf.spare) < self._spares_wanted(shelf) and not shelf.over and not shelf.changed.is_set():
            ready = await self._prepare(template, background=True)
            ready.stage = "spare_machine"
            await _put(shelf, shelf.spare, ready)
        while len(shelf.warm) < self._warm_wanted(shelf) and not shelf.over and not shelf.changed.is_set():
            began = time.monotonic()
            await _put(shelf, shelf.warm, await self._warm(template))
            shelf.refill_s += (time.monotonic() - began - shelf.refill_s) / 4

    def _spares_wanted(self, shelf: Shelf) -> int:
        """As many as were asked for of late: who starts many at one time does so again."""
        if not self._spares:
            return 0
        asked = round(shelf.demand(time.monotonic()) * DEMAND_MEMORY_S)
        return max(self._spares, min(asked, self._spares_max))

    def _warm_wanted(self, shelf: Shelf) -> int:
        """Enough for what is asked for during the time that a new one takes, twice over, within the budget."""
        demand = shelf.demand(time.monotonic())
        if not self._warm_max or demand < 1 / (4 * DEMAND_MEMORY_S):
            return 0
        others = sum(len(other.warm) for other in self._shelves.values() if other is not shelf)
        return max(0, min(math.ceil(2 * demand * shelf.refill_s) + 1, self._warm_max - others))

    async def _warm(self, template: Template) -> Prepared:
        ready = await self._prepare(template, background=True)
        try:
            await ready.machine.load(background=True)
            await ready.agent.identify(identity.fresh("warm", {}))
            for command in REHEARSAL:
                await ready.agent.execute(command)
            await ready.machine.pause()
        except BaseException:
            await ready.aclose()
            raise
        ready.stage = "warm_machine"
        return ready

    async def _prepare(self, template: Template, *, background: bool) -> Prepared:
        def furnish(home: Path) -> None:
            shutil.copyfile(template.blank, home / "disk.qcow2")
            (home / "disk.qcow2").chmod(0o600)

        return await self._make(template, template.saved, furnish, "machine", background=background)

    async def _make(
        self, template: Template, saved: Saved, furnish: Callable[[Path], None], stage: Stage, *, background: bool
    ) -> Prepared:
        home = self.folder / secrets.token_hex(6)
        try:
            await anyio.to_thread.run_sync(make_home, home, template, furnish)
            network = await self._networks.make(template.registries) if saved.spec.network else None
            try:
                return await self._start(template, saved, home, network, stage, background=background)
            except BaseException:
                if network is not None:
                    await network.aclose()
                raise
        except BaseException as exc:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(remove_home, home)
            if isinstance(exc, OSError) and exc.errno in EXHAUSTED:
                raise NoCapacity(f"this host is full, it can run no more sandboxes: {exc.strerror}") from exc
            raise

    async def _start(
        self,
        template: Template,
        saved: Saved,
        home: Path,
        network: Network | None,
        stage: Stage,
        *,
        background: bool,
    ) -> Prepared:
        tap = None if network is None else network.tap
        if not saved.layers:
            layers = await anyio.to_thread.run_sync(self._layers.under, home / "disk.qcow2", home, template.folder)
            saved = replace(saved, layers=layers)
        machine = await self._driver.prepare(saved, home / "disk.qcow2", home, background=background, tap=tap)
        try:
            if network is not None:
                network.space.close_tap()
            agent = Agent(await machine.dial())

            def listen() -> None:
                self._lines.start_soon(agent.run)

            if stage != "saved_machine":
                listen()
            return Prepared(home, machine, agent, template.key, listen, network, template.registries, stage)
        except BaseException:
            await machine.aclose()
            raise


def make_home(home: Path, template: Template, furnish: Callable[[Path], None]) -> None:
    """A machine's own folder; `furnish` puts its disk there. Raises DiskFull."""
    try:
        free = shutil.disk_usage(home.parent).free
        if free < FREE_BYTES_MIN:
            raise DiskFull(f"{home.parent}: {free >> 20} MiB free, a sandbox needs at least {FREE_BYTES_MIN >> 20}")
        home.mkdir(mode=0o700)
        furnish(home)
        pin(template.folder, home)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{home.parent}: no space left for a sandbox") from exc
        raise


def _nothing() -> None:
    """Its agent is listened to already."""


async def _put(shelf: Shelf, ready: deque[Prepared], made: Prepared) -> None:
    """One more that waits, unless its image went while it was made: nobody would ever take it."""
    if shelf.over:
        await made.aclose()
    else:
        ready.append(made)


def remove_home(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
