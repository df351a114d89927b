"""The node's face: starts, runs and ends sandboxes on this host. Satisfies `instavm.control.node.Node`."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
from anyio.abc import TaskGroup, TaskStatus

from instavm.errors import (
    BootFailed,
    GuestProtocolError,
    HostNotReady,
    InstaVMError,
    IsolationTooWeak,
    NoCapacity,
    OutcomeUnknown,
    SessionEnded,
)
from instavm.node import disks, doctor, files, identity, inventory, isolation
from instavm.node.images.store import Image, ImageStore
from instavm.node.jail.jail import Jails
from instavm.node.machines import Machines, Prepared, Record, read_record, remove_home
from instavm.node.templates import Templates
from instavm.node.vmm.base import Driver
from instavm.node.vmm.choose import choose
from instavm.sandbox import (
    Command,
    Ended,
    EndReason,
    HostMemory,
    Isolation,
    NodeInfo,
    Outcome,
    OutputSink,
    SandboxSpec,
    Started,
    StoredFile,
    Tier,
)
from instavm.settings import Settings

log = logging.getLogger(__name__)


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

    def lost(self, why: str) -> None:
        """It can't go on; the reason is kept for who asks."""
        self.why = self.why or why
        self.stop.set()


class Runtime:
    def __init__(
        self,
        settings: Settings,
        jails: Jails,
        driver: Driver,
        probe: str,
        images: ImageStore,
        templates: Templates,
        machines: Machines,
        tasks: TaskGroup,
    ) -> None:
        self._settings = settings
        self._jails = jails
        self._signer = isolation.Signer(settings.state_dir)
        self._driver = driver
        self._probe = probe
        self._images = images
        self._templates = templates
        self._machines = machines
        self._tasks = tasks
        self._live: dict[str, Sandbox] = {}
        self._adopted: dict[str, Started] = {}
        self._leaving = False
        self._found: dict[str, Image] = {}
        self._on_end: Callable[[Ended], None] = lambda ended: None

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings) -> AsyncIterator[Runtime]:
        """A node on this host. Sandboxes of an earlier server that still live are adopted, whatever else it left is removed.

        Every sandbox ends with the block, unless `leave` was called.
        Raises HostNotReady (QEMU or an image is missing, the state directory is in use).
        """
        with ExitStack() as held:
            held.enter_context(_owned(settings))
            jails = held.enter_context(Jails.open(settings))
            driver, probe = await choose(settings, jails)
            held.callback(driver.close)
            images = ImageStore(settings.cache_dir, settings.disk_gib)
            guest = await anyio.to_thread.run_sync(images.ensure_guest)
            templates = Templates(settings.cache_dir, driver, guest, settings.boot_timeout_s)
            machines = Machines(
                settings.state_dir,
                driver,
                spares=settings.spare_machines,
                warm_max=settings.warm_machines,
                warm_memory_mib=settings.warm_memory_mib,
            )
            async with machines.open(), anyio.create_task_group() as tasks:
                runtime = cls(settings, jails, driver, probe, images, templates, machines, tasks)
                try:
                    await runtime._adopt()
                    tasks.start_soon(disks.watch, machines.folder, runtime._disks, runtime._over_disk)
                    yield runtime
                finally:
                    with anyio.CancelScope(shield=True):
                        for vm_id in list(runtime._live):
                            await runtime.stop(vm_id)
                    tasks.cancel_scope.cancel()

    @property
    def tier(self) -> Tier:
        return self._driver.tier

    async def isolation(self, vm_id: str) -> Isolation:
        machine = self._usable(vm_id).prepared
        info = await self.info()
        jail = self._settings.jail
        told = await anyio.to_thread.run_sync(
            isolation.report, vm_id, machine.home.name, machine.machine.pid, info, jail, self._jails.cgroups
        )
        return self._signer.sign(told)

    async def start(self, spec: SandboxSpec) -> Started:
        if not self._driver.tier.satisfies(spec.require_isolation):
            raise IsolationTooWeak(
                f"require_isolation: {spec.require_isolation} asked for, this host has {self._driver.tier} ({self._probe})"
            )
        total = doctor.host_memory_mib()
        if spec.memory_mib > total:
            raise NoCapacity(f"memory_mb: {spec.memory_mib} asked for, this host has {total} in all")
        started: Started = await self._tasks.start(self._life, spec, name=f"sandbox {spec.vm_id}")
        return started

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        sandbox = self._usable(vm_id)
        with _told(sandbox):
            return await sandbox.agent.execute(command, on_output)

    async def put_file(self, vm_id: str, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
        sandbox = self._usable(vm_id)
        with _told(sandbox):
            return await files.put(sandbox.agent, path, name, chunks)

    async def get_file(self, vm_id: str, path: str) -> AsyncGenerator[bytes, None]:
        sandbox = self._usable(vm_id)
        with _told(sandbox):
            async with aclosing(files.get(sandbox.agent, path)) as pieces:
                async for piece in pieces:
                    yield piece

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None:
        sandbox = self._usable(vm_id)
        with _told(sandbox):
            await sandbox.agent.stage_env(dict(env))

    def memory(self) -> HostMemory:
        return doctor.host_memory()

    def _usable(self, vm_id: str) -> Sandbox:
        sandbox = self._live.get(vm_id)
        if sandbox is None or sandbox.stop.is_set():
            raise SessionEnded(f"sandbox {vm_id} is not running")
        return sandbox

    async def stop(self, vm_id: str) -> None:
        sandbox = self._live.get(vm_id)
        if sandbox is not None:
            sandbox.stop.set()
            await sandbox.gone.wait()

    async def adopted(self) -> Mapping[str, Started]:
        return dict(self._adopted)

    async def leave(self) -> None:
        self._leaving = True

    def on_end(self, callback: Callable[[Ended], None]) -> None:
        self._on_end = callback

    async def info(self) -> NodeInfo:
        image = await anyio.to_thread.run_sync(self._images.find, "default")
        return NodeInfo(
            driver=self._driver.name,
            driver_version=await self._driver.version(),
            tier=self._driver.tier,
            probe=self._probe,
            images={} if image is None else {"default": image.digest},
        )

    async def _life(self, spec: SandboxSpec, *, task_status: TaskStatus[Started]) -> None:
        """One sandbox from its first breath to its last. What fails before it is ready is raised to who asked for it."""
        steps = Steps()
        template, cold = await self._templates.get(await self._image(spec.image), spec.vcpus, spec.memory_mib)
        steps.mark("template")
        prepared = await self._machines.take(template)
        steps.mark(prepared.stage)
        try:
            with self._boot_errors(spec):
                await prepared.run()
                steps.mark("restore")
                with anyio.fail_after(self._settings.restore_timeout_s):
                    await prepared.agent.identify(identity.fresh(spec.vm_id, spec.env))
            steps.mark("identity")
            started = Started(spec.vm_id, self._driver.name, self._driver.tier, cold=cold, steps_ms=steps.ms)
            prepared.record(Record(spec.vm_id, cold, steps.ms))
        except BaseException:
            await prepared.aclose()
            raise
        await self._live_out(Sandbox(spec.vm_id, prepared), started, task_status=task_status)

    async def _live_out(self, sandbox: Sandbox, started: Started, *, task_status: TaskStatus[Started]) -> None:
        """From being ready to being gone."""
        self._live[sandbox.vm_id] = sandbox
        try:
            task_status.started(started)
            await self._until_end(sandbox)
        finally:
            if self._leaving and sandbox.why is None:
                await sandbox.prepared.detach()
            else:
                await sandbox.prepared.aclose()
            del self._live[sandbox.vm_id]
            sandbox.gone.set()
        if sandbox.why is not None:
            if sandbox.prepared.machine.over_memory:
                why = "the host ended the machine: its VMM used more memory than a sandbox of this size may"
                self._on_end(Ended(sandbox.vm_id, EndReason.OVER_LIMIT, why))
            else:
                reason = EndReason.OVER_LIMIT if sandbox.over_disk else EndReason.CRASHED
                self._on_end(Ended(sandbox.vm_id, reason, sandbox.why))

    def _disks(self) -> dict[str, Path]:
        return {vm_id: sandbox.prepared.home / "disk.qcow2" for vm_id, sandbox in self._live.items()}

    def _over_disk(self, vm_id: str, why: str) -> None:
        log.warning("%s is ended: %s", vm_id, why)
        self._live[vm_id].over_disk = True
        self._live[vm_id].lost(why)

    async def _adopt(self) -> None:
        """Take over what runs here already; remove what is nobody's."""
        running = await anyio.to_thread.run_sync(inventory.running, self._machines.folder)
        records = {name: found for name in running if (found := read_record(self._machines.folder / name)) is not None}
        keep = frozenset(records)
        ended = await anyio.to_thread.run_sync(inventory.clear, self._settings.state_dir, keep)
        await anyio.to_thread.run_sync(self._jails.clear, keep)
        if ended:
            log.warning("ended %d processes of machines that belonged to nobody", len(ended))
        async with anyio.create_task_group() as tasks:
            for name, record in records.items():
                tasks.start_soon(self._adopt_one, name, running[name], record)

    async def _adopt_one(self, name: str, pid: int, record: Record) -> None:
        home = self._machines.folder / name
        try:
            prepared = await self._machines.adopt(pid, home)
        except (InstaVMError, TimeoutError, OSError) as exc:
            log.warning("%s could not be adopted: %s", record.vm_id, exc)
            await anyio.to_thread.run_sync(remove_home, home)
            return
        started = Started(
            record.vm_id, self._driver.name, self._driver.tier, cold=record.cold, steps_ms=record.steps_ms
        )
        self._adopted[record.vm_id] = await self._tasks.start(self._live_out, Sandbox(record.vm_id, prepared), started)

    async def _until_end(self, sandbox: Sandbox) -> None:
        async def died() -> None:
            status = await sandbox.prepared.machine.wait()
            sandbox.lost(f"the machine ended by itself (status {status})")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(died)
            await sandbox.stop.wait()
            tasks.cancel_scope.cancel()

    async def _image(self, name: str) -> Image:
        if (known := self._found.get(name)) is not None:
            return known
        image = await anyio.to_thread.run_sync(self._images.find, name)
        if image is None:
            raise HostNotReady(f"image {name!r} is not on this host; scripts/start builds the default one")
        self._found[name] = image
        return image

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


@contextmanager
def _told(sandbox: Sandbox) -> Iterator[None]:
    """A line that broke, or a guest that lies, is the end of its sandbox."""
    try:
        yield
    except OutcomeUnknown as exc:
        sandbox.lost(str(exc))
        raise
    except GuestProtocolError as exc:
        sandbox.lost(str(exc))
        raise OutcomeUnknown(f"the sandbox was ended while the command ran: {exc}") from exc


@contextmanager
def _owned(settings: Settings) -> Iterator[None]:
    """The state directory, for one server at a time; the kernel lets go of it however we end."""
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(settings.state_dir / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise HostNotReady(
                f"another server uses {settings.state_dir}; stop it, or set INSTAVM_STATE_DIR to another folder"
            ) from exc
        yield
    finally:
        os.close(fd)
