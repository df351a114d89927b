"""Machines made ahead of time: VMM processes with overlay and sockets that wait for a template's state.

Nothing of a guest runs in a spare one, and none of its memory is read yet. One loop per template compares how many
there are with how many there should be.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import ByteStream

from instavm.errors import DiskFull
from instavm.node.templates import Template
from instavm.node.vmm.base import Driver, Machine

FREE_BYTES_MIN = 512 << 20
"""No sandbox is started when the disk has less left than this."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A machine that waits for `load`, with its folder and the line to its agent."""

    home: Path
    machine: Machine
    line: ByteStream

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self.machine.aclose()
            await self.line.aclose()
            await anyio.to_thread.run_sync(remove_home, self.home)


class Machines:
    def __init__(self, state_dir: Path, driver: Driver, spares: int) -> None:
        self.folder = state_dir / "machines"
        self._driver = driver
        self._wanted = spares
        self._spares: dict[str, deque[Prepared]] = {}
        self._taken: dict[str, anyio.Event] = {}

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keeps spare machines for as long as the block lasts, and ends them with it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                yield
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                for spare in self.prepared():
                    await spare.aclose()
                self._spares.clear()

    async def take(self, template: Template) -> tuple[Prepared, bool]:
        """A prepared machine, and whether it was a spare. The caller closes it.

        Raises: BootFailed, HostNotReady, DiskFull.
        """
        spares = self._keep(template)
        while spares:
            spare = spares.popleft()
            self._taken[template.key].set()
            if spare.machine.alive:
                return spare, True
            await spare.aclose()
        return await self._prepare(template, background=False), False

    def prepared(self) -> list[Prepared]:
        """The spare machines of all templates."""
        return [spare for spares in self._spares.values() for spare in spares]

    def _keep(self, template: Template) -> deque[Prepared]:
        if template.key not in self._spares:
            self._spares[template.key] = deque()
            self._taken[template.key] = anyio.Event()
            if self._wanted:
                self._tasks.start_soon(self._refill, template)
        return self._spares[template.key]

    async def _refill(self, template: Template) -> None:
        spares = self._spares[template.key]
        while True:
            while len(spares) < self._wanted:
                try:
                    spares.append(await self._prepare(template, background=True))
                except Exception:  # the edge of this task: whoever asks for a machine next is told
                    break
            self._taken[template.key] = anyio.Event()
            await self._taken[template.key].wait()

    async def _prepare(self, template: Template, *, background: bool) -> Prepared:
        home = self.folder / secrets.token_hex(6)
        try:
            await anyio.to_thread.run_sync(make_home, home, template)
            machine = await self._driver.prepare(template.saved, home / "disk.qcow2", home, background=background)
            try:
                return Prepared(home, machine, await machine.dial())
            except BaseException:
                await machine.aclose()
                raise
        except BaseException:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(remove_home, home)
            raise


def make_home(home: Path, template: Template) -> None:
    """A machine's own folder with its own disk. Raises DiskFull."""
    try:
        free = shutil.disk_usage(home.parent).free
        if free < FREE_BYTES_MIN:
            raise DiskFull(f"{home.parent}: {free >> 20} MiB free, a sandbox needs at least {FREE_BYTES_MIN >> 20}")
        home.mkdir(mode=0o700)
        shutil.copyfile(template.blank, home / "disk.qcow2")
        (home / "disk.qcow2").chmod(0o600)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{home.parent}: no space left for a sandbox") from exc
        raise


def remove_home(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
