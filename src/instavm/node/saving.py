"""Saving sandboxes that live: putting them to rest, copying them, and taking snapshots of their disks.

Each works on one sandbox, which is left as it was when something goes wrong. Blocking work is done in threads.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import anyio
import anyio.to_thread

from instavm.contract.snapshots import Stored
from instavm.errors import CorruptSnapshot, SnapshotError
from instavm.node.images.oci import WORKDIR, Fetched
from instavm.node.layers import LINKS, Layers, held, overlay
from instavm.node.machines import Prepared
from instavm.node.snapshots import CHANGES, STATE, Manifest, Snapshots, pin, told_when_full
from instavm.node.sparse import digest
from instavm.node.templates import DESCRIPTION, Template
from instavm.node.vmm.base import Driver, Saved

SYSTEM: Final = "system"
FREEZE_S: Final = 10.0
"""How long a guest may take to write out what it has in memory before a snapshot of its disk is given up."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A moment of a sandbox: its memory, its devices, and the layer that was its disk. `owner` holds the layers."""

    template: str
    saved: Saved
    disk: str
    owner: Path
    pause_ms: float


class Saving:
    def __init__(self, driver: Driver, layers: Layers, snapshots: Snapshots) -> None:
        self._driver = driver
        self._layers = layers
        self._snapshots = snapshots

    async def suspend(self, name: str, prepared: Prepared, template: Template) -> None:
        """Write all of a sandbox to the snapshot `name` and leave it paused: whoever asked ends it now.

        Raises DiskFull, BootFailed, OSError; then it runs as before.
        """
        with self._snapshots.making(name) as folder:
            await prepared.machine.pause()
            linked: Path | None = None
            try:
                await prepared.machine.save_changes(template.saved.memory, folder / STATE, folder / CHANGES)
                linked = await anyio.to_thread.run_sync(self._link_disk, prepared, folder)
                about = self._manifest("memory", linked.name, template)
                await anyio.to_thread.run_sync(pin, template.folder, folder)
                _keep_system(template.saved.spec.system, folder)
                await anyio.to_thread.run_sync(self._snapshots.seal, folder, name, about)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    if linked is not None:
                        linked.unlink(missing_ok=True)
                    await prepared.machine.resume()
                raise

    @asynccontextmanager
    async def copied(self, prepared: Prepared, template: Template) -> AsyncIterator[Copy]:
        """A copy of a sandbox that goes on meanwhile; it is there for as long as the block lasts."""
        with self._snapshots.making("copy") as folder:
            async with self._new_layer(prepared, template) as (layer, new):
                began = time.perf_counter()
                await prepared.machine.pause()
                try:
                    await prepared.machine.save_changes(template.saved.memory, folder / STATE, folder / CHANGES)
                    await prepared.machine.new_layer(new)
                finally:
                    with anyio.CancelScope(shield=True):
                        await prepared.machine.resume()
                pause_ms = (time.perf_counter() - began) * 1000
            await anyio.to_thread.run_sync(self._layers.share, prepared.home, folder)
            spec = template.saved.spec
            saved = Saved(spec, template.saved.memory, folder / STATE, (), folder / CHANGES)
            yield Copy(template.key, saved, layer, folder, pause_ms)

    async def snapshot(self, name: str, prepared: Prepared, template: Template) -> float:
        """The disk of a sandbox that goes on, as the snapshot `name`. Returns: how long it could not write, in ms.

        Raises SnapshotError (the guest did not hold still), DiskFull, BootFailed, OutcomeUnknown.
        """
        still, pause_ms = False, 0.0
        with self._snapshots.making(name) as folder:
            async with self._new_layer(prepared, template) as (layer, new):
                began = time.perf_counter()
                try:
                    with anyio.fail_after(FREEZE_S):
                        await prepared.agent.freeze()
                    began = time.perf_counter()
                    await prepared.machine.new_layer(new)
                except TimeoutError:
                    raise SnapshotError(
                        f"the sandbox did not write out what it has in memory within {FREEZE_S:.0f} s; try again"
                    ) from None
                finally:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(FREEZE_S):
                        still = await prepared.agent.thaw()
                pause_ms = (time.perf_counter() - began) * 1000
            if not still:
                raise SnapshotError("the sandbox did not hold still for the snapshot; try again")
            await anyio.to_thread.run_sync(self._layers.share, prepared.home, folder)
            await anyio.to_thread.run_sync(pin, template.folder, folder)
            about = self._manifest("disk", layer, template)
            await anyio.to_thread.run_sync(self._snapshots.seal, folder, name, about)
        return pause_ms

    async def merge(self, prepared: Prepared, template: Template) -> None:
        """Make a sandbox's disk one layer on its template again, while it runs. Raises BootFailed."""
        layers = held(prepared.home)
        await prepared.machine.merge_layers(template.disk)
        for layer in layers:
            (prepared.home / LINKS / layer).unlink()

    async def find(self, name: str, template: Template) -> Copy:
        """A sandbox at rest, checked: nothing of it has run when this raises. Raises CorruptSnapshot, SnapshotError."""
        about = self._snapshots.read(name)
        now = self._manifest("memory", about.disk, template)
        for what, then, here in (
            ("VMM", about.vmm, now.vmm),
            ("processor", about.cpu, now.cpu),
            ("guest protocol", about.protocol, now.protocol),
            ("kernel and agent", about.guest, now.guest),
            ("template", about.template_digest, await anyio.to_thread.run_sync(_template_digest, template)),
        ):
            if then != here:
                raise CorruptSnapshot(f"{name} was saved with another {what}: {then!r}, here it is {here!r}")
        await anyio.to_thread.run_sync(self._snapshots.verify, name, about)
        folder = self._snapshots.folder / name
        spec = template.saved.spec
        if not spec.system.exists() and (folder / SYSTEM).exists():
            spec = replace(spec, system=folder / SYSTEM)
        saved = Saved(spec, template.saved.memory, folder / STATE, (), folder / CHANGES)
        return Copy(template.key, saved, about.disk, folder, 0.0)

    def stored(self, name: str, pause_ms: float = 0.0) -> Stored:
        own, shared = self._snapshots.sizes(name)
        return Stored(name, own, shared, pause_ms)

    async def settle(self, name: str, folder: Path, layer: str, fetched: Fetched, size_bytes: int) -> None:
        """Make what was fetched the snapshot `name`. `layer`, a raw disk, is linked in `folder` already."""
        about = Manifest(
            kind="disk",
            disk=layer,
            disk_format="raw",
            size_bytes=size_bytes,
            env=fetched.env,
            workdir=WORKDIR,
            image=fetched.digest,
            vcpus=0,
            memory_mib=0,
            sha256={},
            labels=fetched.labels,
        )
        await anyio.to_thread.run_sync(self._snapshots.seal, folder, name, about)

    @asynccontextmanager
    async def _new_layer(self, prepared: Prepared, template: Template) -> AsyncIterator[tuple[str, Path]]:
        """`(the layer that the present disk becomes, an empty overlay on it)`; the block puts it in place or raises."""
        old = prepared.disk
        new = prepared.home / f"disk-{secrets.token_hex(4)}.qcow2"
        layer = await anyio.to_thread.run_sync(self._name_layer, prepared.home, old, template, new)
        try:
            yield layer, new
        except BaseException:
            if not (prepared.machine.alive and _opened(prepared.machine.pid, new)):
                new.unlink(missing_ok=True)
                (prepared.home / LINKS / layer).unlink(missing_ok=True)
                self._layers.path(layer).unlink(missing_ok=True)
                raise
            old.unlink()
            raise
        await anyio.to_thread.run_sync(old.unlink)
        await anyio.to_thread.run_sync(self._layers.close, layer)

    def _name_layer(self, home: Path, old: Path, template: Template, new: Path) -> str:
        layer = secrets.token_hex(12) + old.suffix
        with told_when_full(home):
            try:
                overlay(template.blank, self._layers.path(layer), new)
                self._layers.link(old, layer, home)
            except BaseException:
                new.unlink(missing_ok=True)
                (home / LINKS / layer).unlink(missing_ok=True)
                raise
        return layer

    def _link_disk(self, prepared: Prepared, folder: Path) -> Path:
        """The disk of a machine that stands still becomes a layer of `folder`, beside those that it stands on."""
        layer = secrets.token_hex(12) + ".qcow2"
        self._layers.share(prepared.home, folder)
        self._layers.link(prepared.disk, layer, folder)
        self._layers.close(layer)
        return self._layers.path(layer)

    def _manifest(self, kind: Literal["disk", "memory"], disk: str, template: Template) -> Manifest:
        spec = template.saved.spec
        return Manifest(
            kind=kind,
            disk=disk,
            disk_format="qcow2",
            size_bytes=_virtual_size(template.blank),
            env=template.env,
            workdir=template.workdir,
            image=template.image,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            sha256={},
            template=template.key,
            template_digest=_template_digest(template),
            vmm=self._driver.fingerprint(spec.hardware),
            cpu=self._driver.processor(),
            guest=template.guest,
            system=str(spec.system),
        )


def _keep_system(system: Path, folder: Path) -> None:
    """Builds of the guest's base are removed some hours after a newer one has taken their place; a link outlives that."""
    with suppress(OSError):
        os.link(system, folder / SYSTEM)


def _template_digest(template: Template) -> str:
    return digest(template.folder / DESCRIPTION)


def _virtual_size(disk: Path) -> int:
    """Of a qcow2. Its header has it as a number of 8 bytes, 24 bytes from the beginning."""
    with disk.open("rb") as file:
        return int.from_bytes(file.read(32)[24:], "big")


def _opened(pid: int, file: Path) -> bool:
    """Whether a process has the file open."""
    inode = file.stat().st_ino
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if fd.stat().st_ino == inode:
                return True
        except OSError:
            continue
    return False
