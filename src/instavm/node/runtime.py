"""The node's face: starts, runs and ends sandboxes on this host. Satisfies `instavm.contract.node.Node`."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
from anyio.abc import TaskGroup, TaskStatus

from instavm.contract.egress import Egress, EgressDecision, EgressLog
from instavm.contract.executions import Command, Outcome, OutputSink
from instavm.contract.files import StoredFile
from instavm.contract.host import HostMemory, NodeInfo, NodeMetrics
from instavm.contract.isolation import Isolation, Tier
from instavm.contract.processes import ProcessLog, ProcessSpec, ProcessState, ProcessWait
from instavm.contract.sandboxes import Ended, EndReason, SandboxSpec, Started
from instavm.contract.snapshots import Pull, Pulled, Stored
from instavm.errors import (
    CorruptTemplate,
    HostNotReady,
    InstaVMError,
    IsolationTooWeak,
    NoCapacity,
    SessionEnded,
)
from instavm.node import disks, files, inventory, isolation, memory, parts, processes, shares
from instavm.node.agent import Agent
from instavm.node.console import last_lines
from instavm.node.images import oci
from instavm.node.images.store import ImageStore
from instavm.node.jail.jail import Jails
from instavm.node.layers import DEEP, Layers, held
from instavm.node.live import Sandbox, told
from instavm.node.machines import Machines, Prepared, Record, read_record, remove_home
from instavm.node.network.guard import Networks
from instavm.node.network.policy import Policy
from instavm.node.parts import Part
from instavm.node.registries import ask as ask_registries
from instavm.node.saving import Copy, Saving
from instavm.node.snapshots import Snapshots
from instavm.node.starts import Starts
from instavm.node.templates import Template, Templates
from instavm.node.trust import Trust
from instavm.node.vmm.base import Driver
from instavm.node.vmm.choose import choose, program
from instavm.settings import Settings

log = logging.getLogger(__name__)

LAST_LOG_S = 2.0
LAST_LOGS = 128
"""Egress logs of ended sandboxes that nobody has asked for yet; control asks as soon as one has ended."""


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
        networks: Networks,
        layers: Layers,
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
        self._networks = networks
        self._layers = layers
        self._snapshots = Snapshots(settings.state_dir, layers)
        self._saving = Saving(driver, layers, self._snapshots)
        self._starts = Starts(settings, driver, images, templates, machines, networks, self._snapshots, self._saving)
        self._tasks = tasks
        self._coming: dict[str, anyio.Event] = {}
        """Sandboxes that are started; set when they are up, or won't be."""
        self._live: dict[str, Sandbox] = {}
        self._adopted: dict[str, Started] = {}
        self._leaving = False
        self.last_pause_ms = 0.0
        """How long the source of the latest fork stood still."""
        self._egress_logs: OrderedDict[str, EgressLog] = OrderedDict()
        """Of sandboxes that have ended, until they are asked for."""
        self._pulling: dict[str, anyio.Lock] = {}
        self._on_end: Callable[[Ended], None] = lambda ended: None

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, closed_ports: Sequence[int] = ()) -> AsyncIterator[Runtime]:
        """A node on this host. Sandboxes of an earlier server that still live are adopted, whatever else it left is removed.

        Every sandbox ends with the block, unless `leave` was called.
        closed_ports: TCP ports of this host that no policy opens: the control plane's.
        Raises HostNotReady (QEMU or an image is missing, the state directory is in use).
        """
        with ExitStack() as undo:
            undo.enter_context(_owned(settings))
            jails = undo.enter_context(Jails.open(settings))
            driver, probe = await choose(settings, jails)
            undo.callback(driver.close)
            images = ImageStore(settings.cache_dir, settings.disk_gib)
            guest = await anyio.to_thread.run_sync(images.ensure_guest)
            networks, layers = Networks(settings, closed_ports), Layers(settings)
            machines = Machines(
                settings.state_dir,
                driver,
                networks,
                layers,
                spares=settings.spare_machines,
                spares_max=settings.spare_machines_max,
                warm_max=settings.warm_machines,
                warm_memory_mib=settings.warm_memory_mib,
            )
            async with networks.open(), machines.open(), anyio.create_task_group() as tasks:
                trust = await anyio.to_thread.run_sync(Trust, settings.egress_ca_file)
                templates = Templates(settings, driver, guest, networks, trust)
                runtime = cls(settings, jails, driver, probe, images, templates, machines, networks, layers, tasks)
                try:
                    await runtime._adopt()
                    await anyio.to_thread.run_sync(templates.clear)
                    await anyio.to_thread.run_sync(runtime._snapshots.sweep)
                    await runtime._sweep()
                    tasks.start_soon(disks.watch, machines.folder, runtime._homes, runtime._over_disk)
                    if jails.cgroups is not None:
                        tasks.start_soon(shares.watch, jails.cgroups, runtime._running)
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
        made_of = await self._made_of(machine, info)
        egress = None if machine.network is None else await machine.network.in_force()
        about = (vm_id, machine.home.name, machine.machine.pid, info, self._settings.jail, self._jails.cgroups, egress)
        told = await anyio.to_thread.run_sync(isolation.report, *about, made_of)
        return self._signer.sign(told)

    async def _made_of(self, prepared: Prepared, info: NodeInfo) -> list[Part]:
        """What confines a sandbox, with versions and ages."""
        try:
            kernel = (await self._templates.by_key(prepared.template)).saved.spec.kernel
        except CorruptTemplate:  # its files are gone, which a sandbox that runs does not need
            kernel = None
        vmm = (info.driver, program(self._settings, info.driver), info.driver_version)
        return await anyio.to_thread.run_sync(parts.parts, *vmm, info.tier, kernel)

    async def start(self, spec: SandboxSpec) -> Started:
        if not self._driver.tier.satisfies(spec.require_isolation):
            raise IsolationTooWeak(
                f"require_isolation: {spec.require_isolation} asked for, this host has {self._driver.tier} ({self._probe})"
            )
        total = memory.total_mib()
        if spec.memory_mib > total:
            raise NoCapacity(f"memory_mb: {spec.memory_mib} asked for, this host has {total} in all")
        coming = self._coming[spec.vm_id] = anyio.Event()
        try:
            started: Started = await self._tasks.start(self._life, spec, None, name=f"sandbox {spec.vm_id}")
        finally:
            del self._coming[spec.vm_id]
            coming.set()
        return started

    async def suspend(self, vm_id: str) -> Stored:
        sandbox = self._usable(vm_id)
        async with sandbox.saving:
            began = time.perf_counter()
            with told(sandbox):
                await self._saving.suspend(vm_id, sandbox.prepared, await self._template_of(sandbox))
            pause_ms = (time.perf_counter() - began) * 1000
            sandbox.at_rest = True
            await self.stop(vm_id)
        return await self._stored(vm_id, pause_ms)

    async def fork(self, vm_id: str, specs: Sequence[SandboxSpec]) -> list[Started | InstaVMError]:
        sandbox = self._usable(vm_id)
        children: dict[str, Started | InstaVMError] = {}

        async def child(spec: SandboxSpec, copy: Copy) -> None:
            try:
                children[spec.vm_id] = await self._tasks.start(self._life, spec, copy, name=f"sandbox {spec.vm_id}")
            except InstaVMError as exc:
                children[spec.vm_id] = exc

        template = await self._template_of(sandbox)
        async with (
            sandbox.saving,
            self._saving.copied(sandbox.prepared, template) as copy,
            anyio.create_task_group() as tasks,
        ):
            self.last_pause_ms = copy.pause_ms
            for spec in specs:
                tasks.start_soon(child, spec, copy)
        self._keep_flat(sandbox)
        return [children[spec.vm_id] for spec in specs]

    async def snapshot(self, vm_id: str, name: str) -> Stored:
        sandbox = self._usable(vm_id)
        async with sandbox.saving:
            with told(sandbox):
                pause_ms = await self._saving.snapshot(name, sandbox.prepared, await self._template_of(sandbox))
        self._keep_flat(sandbox)
        await self._changed(name)
        return await self._stored(name, pause_ms)

    async def prepare(self, name: str, vcpus: int, memory_mib: int) -> None:
        await self._templates.get(await self._starts.image(name), vcpus, memory_mib)

    async def pull(self, name: str, ask: Pull, progress: Callable[[str], None]) -> Pulled:
        with self._snapshots.making(name) as folder, self._snapshots.making(f"{name}-pull") as work:
            image = oci.Image(ask, work, progress)
            fetched = await image.resolve()
            mark = f"{fetched.digest} {ask.disk_gib} {oci.ARCHITECTURE}"
            layer = hashlib.sha256(mark.encode()).hexdigest()[:24] + ".raw"
            async with self._pulling.setdefault(layer, anyio.Lock()):
                if not await anyio.to_thread.run_sync(self._layers.shared, layer, folder):
                    await image.write(work / "disk.raw")
                    await anyio.to_thread.run_sync(self._layers.link, work / "disk.raw", layer, folder)
                else:
                    progress("it is on this host already")
            size = self._layers.path(layer).stat().st_size
            await self._saving.settle(name, folder, layer, fetched, size)
        return Pulled(await self._stored(name), fetched.digest, fetched.env, fetched.labels)

    async def stored(self) -> Mapping[str, Stored]:
        names = await anyio.to_thread.run_sync(self._snapshots.names)
        return {name: await self._stored(name) for name in names}

    async def forget(self, name: str) -> None:
        await anyio.to_thread.run_sync(self._snapshots.remove, name)
        await self._changed(name)
        await self._sweep()

    async def _changed(self, name: str) -> None:
        """What was known of that snapshot is known no more."""
        self._starts.forget(name)
        for key in self._templates.forget(name):
            await self._machines.drop(key)

    async def clear_up(self, *, dry_run: bool) -> Sequence[str]:
        return await anyio.to_thread.run_sync(self._layers.unheld) if dry_run else await self._sweep()

    async def _stored(self, name: str, pause_ms: float = 0.0) -> Stored:
        return await anyio.to_thread.run_sync(self._saving.stored, name, pause_ms)

    async def _sweep(self) -> list[str]:
        images = await anyio.to_thread.run_sync(self._snapshots.images)
        await anyio.to_thread.run_sync(self._templates.sweep, images)
        return await anyio.to_thread.run_sync(self._layers.sweep)

    async def _template_of(self, sandbox: Sandbox) -> Template:
        return await self._templates.by_key(sandbox.prepared.template)

    def _keep_flat(self, sandbox: Sandbox) -> None:
        """Have the layers of a disk merged, once there are many."""
        if len(held(sandbox.prepared.home)) > DEEP:
            self._tasks.start_soon(self._flatten, sandbox, name=f"merging {sandbox.vm_id}")

    async def _flatten(self, sandbox: Sandbox) -> None:
        template = await self._template_of(sandbox)
        async with sandbox.saving:
            if sandbox.stop.is_set() or len(held(sandbox.prepared.home)) <= DEEP:
                return
            try:
                await self._saving.merge(sandbox.prepared, template)
            except InstaVMError as exc:  # the edge of this task: it goes on with the layers that it has
                log.warning("the layers of %s could not be merged: %s", sandbox.vm_id, exc)
                return
        await anyio.to_thread.run_sync(self._layers.sweep)

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        if (coming := self._coming.get(vm_id)) is not None:
            await coming.wait()
        sandbox = self._usable(vm_id)
        with told(sandbox), sandbox.prepared.refusals() as refusals:
            outcome = await sandbox.agent.execute(command, on_output)
        return replace(outcome, refused=seen) if (seen := refusals.seen()) else outcome

    async def put_file(self, vm_id: str, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
        sandbox = self._usable(vm_id)
        with told(sandbox):
            return await files.put(sandbox.agent, path, name, chunks)

    async def get_file(self, vm_id: str, path: str) -> AsyncGenerator[bytes, None]:
        sandbox = self._usable(vm_id)
        with told(sandbox):
            async with aclosing(files.get(sandbox.agent, path)) as pieces:
                async for piece in pieces:
                    yield piece

    async def start_process(self, vm_id: str, spec: ProcessSpec) -> ProcessState:
        with self._agent(vm_id) as agent:
            return await processes.start(agent, spec)

    async def processes(self, vm_id: str) -> list[ProcessState]:
        with self._agent(vm_id) as agent:
            return await processes.listing(agent)

    async def read_process(
        self, vm_id: str, process_id: str, since: int, size: int, until: ProcessWait, timeout_s: float
    ) -> ProcessLog:
        with self._agent(vm_id) as agent:
            return await processes.read(agent, process_id, since, size, until, timeout_s)

    async def write_process(self, vm_id: str, process_id: str, data: bytes, last: bool) -> ProcessState:
        with self._agent(vm_id) as agent:
            return await processes.write(agent, process_id, data, last)

    async def signal_process(self, vm_id: str, process_id: str, signum: int) -> ProcessState:
        with self._agent(vm_id) as agent:
            return await processes.send_signal(agent, process_id, signum)

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None:
        sandbox = self._usable(vm_id)
        with told(sandbox):
            await sandbox.agent.stage_env(dict(env))

    async def set_egress(self, vm_id: str, egress: Egress) -> None:
        await self._starts.open(self._usable(vm_id).prepared, egress)

    async def ask_registries(self, vm_id: str) -> None:
        sandbox = self._usable(vm_id)
        with told(sandbox):
            sandbox.prepared.registries = await ask_registries(sandbox.agent)

    async def check_egress(
        self, vm_id: str | None, host: str, port: int, protocol: str, egress: Egress | None = None
    ) -> EgressDecision:
        if self._networks.refusal is not None:
            raise HostNotReady(f"sandboxes have no network here: {self._networks.refusal}")
        if vm_id is None:
            policy = Policy(egress or Egress(), [*await self._starts.registries(), *self._networks.registries])
            return await self._networks.check("", policy, host, port, protocol)
        network = self._usable(vm_id).prepared.network
        if network is None:
            raise HostNotReady("this sandbox was started without a network")
        return await network.check(host, port, protocol, egress)

    async def egress_log(self, vm_id: str) -> EgressLog:
        if (last := self._egress_logs.pop(vm_id, None)) is not None:
            return last
        network = self._usable(vm_id).prepared.network
        return EgressLog() if network is None else await network.log()

    async def _keep_egress_log(self, sandbox: Sandbox) -> None:
        """Before its network goes. A filter that does not answer keeps nobody from ending."""
        network = sandbox.prepared.network
        if network is None or network.networks.stopped():
            return
        with suppress(HostNotReady), anyio.move_on_after(LAST_LOG_S, shield=True):
            self._egress_logs[sandbox.vm_id] = await network.log()
            if len(self._egress_logs) > LAST_LOGS:
                self._egress_logs.popitem(last=False)

    async def responds(self, within_s: float) -> bool:
        return True

    def memory(self) -> HostMemory:
        return memory.now()

    def pid_of(self, vm_id: str) -> int:
        """The VMM's process, for who measures. Raises SessionEnded."""
        return self._usable(vm_id).prepared.machine.pid

    def _usable(self, vm_id: str) -> Sandbox:
        sandbox = self._live.get(vm_id)
        if sandbox is None or sandbox.stop.is_set():
            raise SessionEnded(f"sandbox {vm_id} is not running")
        return sandbox

    @contextmanager
    def _agent(self, vm_id: str) -> Iterator[Agent]:
        sandbox = self._usable(vm_id)
        with told(sandbox):
            yield sandbox.agent

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

    async def metrics(self) -> NodeMetrics:
        return self._starts.tally.now(self._machines, len(self._live))

    async def info(self) -> NodeInfo:
        image = await anyio.to_thread.run_sync(self._images.find, "default")
        return NodeInfo(
            driver=self._driver.name,
            driver_version=await self._driver.version(),
            tier=self._driver.tier,
            probe=self._probe,
            images={} if image is None else {"default": image.digest},
        )

    async def _life(self, spec: SandboxSpec, copy: Copy | None, *, task_status: TaskStatus[Started]) -> None:
        """One sandbox from its first breath to its last. What fails before it is ready is raised to who asked for it."""
        with self._starts.tally.failures():
            prepared, started = await self._starts.bring_up(spec, copy)
        sandbox = Sandbox(spec.vm_id, prepared)
        self._keep_flat(sandbox)
        await self._live_out(sandbox, started, task_status=task_status)

    async def _live_out(self, sandbox: Sandbox, started: Started, *, task_status: TaskStatus[Started]) -> None:
        """From being ready to being gone."""
        self._live[sandbox.vm_id] = sandbox
        console = ""
        try:
            task_status.started(started)
            await self._until_end(sandbox)
        finally:
            if self._leaving and sandbox.why is None and not sandbox.at_rest:
                await sandbox.prepared.detach()
            else:
                await self._keep_egress_log(sandbox)
                if sandbox.why is not None:
                    console = await last_lines(sandbox.prepared.machine)
                await sandbox.prepared.aclose()
            del self._live[sandbox.vm_id]
            sandbox.gone.set()
        if sandbox.why is not None:
            reason, why = EndReason.CRASHED, sandbox.why
            if sandbox.over_disk:
                reason = EndReason.OVER_LIMIT
            elif sandbox.prepared.machine.over_memory:
                reason = EndReason.OVER_LIMIT
                why = "the host ended the machine: its VMM used more memory than a sandbox of this size may"
            self._on_end(Ended(sandbox.vm_id, reason, why, console))

    def _homes(self) -> dict[str, Path]:
        return {vm_id: sandbox.prepared.home for vm_id, sandbox in self._live.items()}

    def _running(self) -> dict[str, int]:
        """Machine → its VMM's process."""
        lives = [sandbox.prepared for sandbox in self._live.values()]
        return {one.home.name: one.machine.pid for one in lives if one.machine.alive}

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
            prepared = await self._machines.adopt(pid, home, record)
            await prepared.machine.resume()  # the last server may have been killed while it saved this one
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

        async def deserted() -> None:
            await sandbox.agent.gone.wait()
            sandbox.lost(sandbox.agent.why_gone())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(died)
            tasks.start_soon(deserted)
            await sandbox.stop.wait()
            tasks.cancel_scope.cancel()


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
