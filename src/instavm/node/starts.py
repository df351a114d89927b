"""How a sandbox comes up: from what was asked for to a machine that is ready for its user."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from instavm.contract.egress import Egress
from instavm.contract.sandboxes import SandboxSpec, Started
from instavm.errors import BootFailed, CorruptSnapshot, CorruptTemplate, HostNotReady, InstaVMError
from instavm.node.console import last_lines
from instavm.node.images import rootfs
from instavm.node.images.store import Image, ImageStore
from instavm.node.live import Steps
from instavm.node.machines import Machines, Prepared, Record
from instavm.node.network.guard import Networks
from instavm.node.network.policy import Registry
from instavm.node.registries import to_json
from instavm.node.saving import Copy, Saving
from instavm.node.snapshots import Snapshots
from instavm.node.tally import Tally
from instavm.node.templates import Template, Templates
from instavm.node.turns import Turns
from instavm.node.vmm.base import Driver
from instavm.settings import Settings
from instavm_guest.frames import PROTOCOL


class Starts:
    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        images: ImageStore,
        templates: Templates,
        machines: Machines,
        networks: Networks,
        snapshots: Snapshots,
        saving: Saving,
    ) -> None:
        self._settings = settings
        self._driver = driver
        self._images = images
        self._templates = templates
        self._machines = machines
        self._networks = networks
        self._snapshots = snapshots
        self._saving = saving
        self._turns = Turns(max(2, os.cpu_count() or 1))
        self._found: dict[str, Image] = {}
        self.tally = Tally()
        """Of all starts, for the metrics."""

    async def bring_up(self, spec: SandboxSpec, copy: Copy | None) -> tuple[Prepared, Started]:
        """A machine that is ready for its user, with a note beside it that says whose it is."""
        steps = Steps()
        template, copy, cold = await self._origin(spec, copy, steps)
        async with self._turns.one():
            steps.mark("turn")
            prepared = await self._begun(spec, template, copy, steps)
        try:
            with self._boot_errors(spec):
                if spec.egress.opens:
                    await self.open(prepared, spec.egress)
                    steps.mark("egress")
            started = Started(spec.vm_id, self._driver.name, self._driver.tier, cold=cold, steps_ms=steps.ms)
            self.tally.started(prepared.stage, steps.ms, cold=cold)
            registries = to_json(prepared.registries)
            prepared.record(Record(spec.vm_id, cold, steps.ms, prepared.template, registries, PROTOCOL))
        except BaseException as exc:
            await self._give_up(prepared, exc)
            raise
        return prepared, started

    async def _origin(self, spec: SandboxSpec, copy: Copy | None, steps: Steps) -> tuple[Template, Copy | None, bool]:
        """Its template; what it goes on from, if it goes on where another sandbox was; whether the template had to be booted."""
        if copy is None and spec.resumes is None:
            template, cold = await self._templates.get(await self.image(spec.image), spec.vcpus, spec.memory_mib)
            steps.mark("template")
            return template, None, cold
        if copy is not None:
            return await self._templates.by_key(copy.template), copy, False
        assert spec.resumes is not None
        about = await anyio.to_thread.run_sync(self._snapshots.read, spec.resumes)
        try:
            template = await self._templates.by_key(about.template)
        except CorruptTemplate as exc:
            raise CorruptSnapshot(f"{spec.resumes} can't be resumed: {exc}") from exc
        copy = await self._saving.find(spec.resumes, template)
        steps.mark("checks")
        return template, copy, False

    async def _begun(self, spec: SandboxSpec, template: Template, copy: Copy | None, steps: Steps) -> Prepared:
        """A machine that runs and is somebody."""
        if copy is None:
            prepared = await self._machines.take(template)
        else:
            prepared = await self._machines.restore(template, copy.saved, copy.disk, copy.owner)
        try:
            steps.mark(prepared.stage)
            with self._boot_errors(spec):
                await prepared.run()
                steps.mark("restore")
                with anyio.fail_after(self._settings.restore_timeout_s):
                    await prepared.become(spec.vm_id, spec.env)
                steps.mark("identity")
        except BaseException as exc:
            await self._give_up(prepared, exc)
            raise
        return prepared

    async def _give_up(self, prepared: Prepared, exc: BaseException) -> None:
        """End a machine that did not come up; why it did not is told with what its console said last."""
        if isinstance(exc, BootFailed):
            exc.console = await last_lines(prepared.machine)
        await prepared.aclose()

    async def open(self, prepared: Prepared, egress: Egress) -> None:
        """Put a policy in force. Raises HostNotReady."""
        if prepared.network is not None:
            await prepared.network.put(egress, prepared.registries)
        elif egress.opens:
            raise HostNotReady(
                f"this host cannot give sandboxes a network, so only a policy that allows nothing can be set:"
                f" {self._networks.refusal or 'this sandbox was started without one'}"
            )

    async def image(self, name: str) -> Image:
        if (known := self._found.get(name)) is not None:
            return known
        if name != rootfs.DEFAULT:
            await self._stands(name)
            self._found[name] = image = await anyio.to_thread.run_sync(self._snapshots.image, name)
            return image
        found = await anyio.to_thread.run_sync(self._images.find, name)
        if found is None:
            raise HostNotReady(f"image {name!r} is not on this host; scripts/start builds the default one")
        self._found[name] = found
        return found

    async def registries(self) -> tuple[Registry, ...]:
        """Of the default image, as far as they are known."""
        return self._templates.registries(await self.image(rootfs.DEFAULT))

    def forget(self, name: str) -> None:
        """What was known of that snapshot is known no more."""
        self._found.pop(name, None)

    async def _stands(self, name: str) -> None:
        """Whether a disk snapshot still has below it what it was written on. Raises SnapshotError, CorruptSnapshot."""
        about = await anyio.to_thread.run_sync(self._snapshots.read, name)
        if about.template:
            try:
                await self._templates.by_key(about.template)
            except CorruptTemplate as exc:
                raise CorruptSnapshot(f"snapshot {name} can't be used: {exc}") from exc

    @contextmanager
    def _boot_errors(self, spec: SandboxSpec) -> Iterator[None]:
        try:
            yield
        except TimeoutError as exc:
            limit = self._settings.restore_timeout_s
            raise BootFailed(f"sandbox {spec.vm_id} did not answer within {limit:.0f} s of its restore") from exc
        except BootFailed:
            raise
        except InstaVMError as exc:
            raise BootFailed(f"sandbox {spec.vm_id} did not come up: {exc}") from exc
