"""A node without virtual machines: a second, real implementation of the `Node` protocol for tests of the API.

Python runs in one long-lived interpreter per sandbox, shell commands in processes of their own. Magic memory
sizes make it behave badly, so that a test can ask for that through the API, in whatever process the server
runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from instavm.contract.egress import NOTHING, Egress, EgressDecision, EgressLog, Seen
from instavm.contract.executions import Command, Outcome, OutputSink
from instavm.contract.files import StoredFile
from instavm.contract.host import HostMemory, NodeInfo, NodeMetrics
from instavm.contract.isolation import Isolation, Tier
from instavm.contract.sandboxes import Ended, EndReason, SandboxSpec, Started
from instavm.contract.snapshots import Pull, Pulled, Stored
from instavm.errors import (
    BootFailed,
    CorruptSnapshot,
    DiskFull,
    FileError,
    FileMissing,
    InstaVMError,
    NoCapacity,
    OutcomeUnknown,
    SessionEnded,
    SnapshotError,
    UnsupportedOperationError,
)
from instavm.node.network.addresses import Host
from instavm.node.network.decision import Decider
from instavm.node.network.filter.check import check
from instavm.node.network.filter.dial import Dialer
from instavm.node.network.policy import Policy, Registry
from instavm.settings import Settings

BOOT_FAILS_MIB = 257
BOOT_HANGS_MIB = 258
NODE_FULL_MIB = 259
BOOT_FAILS_ONCE_MIB = 260
BOOT_WAITS_MIB = 261

FILE_BYTES_MAX = 64 << 20

INTERPRETER = """
import contextlib, io, json, sys, time, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(json.loads(line), names)
        except SystemExit as exc:
            code = exc.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
    sys.__stdout__.write(json.dumps([out.getvalue(), err.getvalue(), code]) + "\\n")
    sys.__stdout__.flush()
"""


@dataclass(eq=False)
class Place:
    spec: SandboxSpec
    folder: Path
    python: asyncio.subprocess.Process
    started: Started
    env: dict[str, str] = field(default_factory=dict)
    egress: Egress = NOTHING
    shells: set[asyncio.subprocess.Process] = field(default_factory=set)

    def path(self, path: str) -> Path:
        """Its folder is its root, and nothing leads above it."""
        inside = os.path.normpath(os.path.join("/app", path)).lstrip("/")
        return self.folder / inside

    def processes(self) -> list[asyncio.subprocess.Process]:
        return [self.python, *self.shells]


class LocalNode:
    """Records what was asked of it, so that a test can say that nothing was left."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.places: dict[str, Place] = {}
        self.resting: dict[str, Place] = {}
        self.logs: dict[str, EgressLog] = {}
        self.refused: tuple[Seen, ...] = ()
        """What the network is said to have refused to every command."""
        self.booting: dict[str, anyio.Event] = {}
        self.command_came = anyio.Event()
        """For a sandbox that was still coming up."""
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.failures = 0
        self.host = HostMemory(1 << 20, 1 << 20)
        self._tell: Callable[[Ended], None] = lambda ended: None

    async def start(self, spec: SandboxSpec) -> Started:
        began = time.perf_counter()
        up = self.booting[spec.vm_id] = anyio.Event()
        try:
            await self._misbehave(spec)
            if spec.resumes is not None:
                return self._wake(spec)
            folder = self._root / spec.vm_id
            if spec.image != "default":
                shutil.copytree(self._root / spec.image, folder)
            (folder / "app").mkdir(parents=True, exist_ok=True)
            python = await self._process(spec, folder, sys.executable, "-c", INTERPRETER)
        finally:
            del self.booting[spec.vm_id]
            up.set()
        took = (time.perf_counter() - began) * 1000
        started = Started(spec.vm_id, "local", Tier.EMULATED, cold=False, steps_ms={"spawn": took})
        self.places[spec.vm_id] = Place(spec, folder, python, started, egress=spec.egress)
        self.started.append(spec.vm_id)
        return started

    def _wake(self, spec: SandboxSpec) -> Started:
        place = self.resting.pop(spec.resumes or "", None)
        if place is None:
            raise CorruptSnapshot(f"{spec.resumes} was altered")
        for process in place.processes():
            process.send_signal(signal.SIGCONT)
        place.spec, place.started = (
            spec,
            Started(spec.vm_id, "local", Tier.EMULATED, cold=False, steps_ms={"wake": 1.0}),
        )
        self.places[spec.vm_id] = place
        self.started.append(spec.vm_id)
        return place.started

    async def execute(self, vm_id: str, command: Command, on_output: OutputSink | None = None) -> Outcome:
        if (up := self.booting.get(vm_id)) is not None:
            self.command_came.set()
            await up.wait()
        place = self.places.get(vm_id)
        if place is None:
            raise SessionEnded(f"there is no sandbox {vm_id} here")
        began = time.perf_counter()
        try:
            with anyio.fail_after(command.timeout_s):
                tell = on_output or (lambda stream, data: None)
                if command.language == "python":
                    out, err, code = await self._python(place, command)
                    tell("stdout", out.encode())
                    tell("stderr", err.encode())
                else:
                    out, err, code = await self._shell(place, command, tell)
        except TimeoutError:
            took = time.perf_counter() - began
            return Outcome("", "timed out\n", 124, took, 0.0, timed_out=True, reason="timeout")
        return Outcome(out, err, code, time.perf_counter() - began, 0.0, refused=self.refused)

    async def stop(self, vm_id: str) -> None:
        self.stopped.append(vm_id)
        place = self.places.pop(vm_id, None)
        if place is None:
            return
        for process in place.processes():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def set_egress(self, vm_id: str, egress: Egress) -> None:
        self._place(vm_id).egress = egress

    async def ask_registries(self, vm_id: str) -> None:
        self._place(vm_id)

    async def check_egress(
        self, vm_id: str | None, host: str, port: int, protocol: str, egress: Egress | None = None
    ) -> EgressDecision:
        """As the filter does it, in this process."""
        policy = egress if egress is not None else self._place(vm_id or "").egress
        decider = Decider(Policy(policy, [Registry("index.test")]), Host(), frozenset())
        return await check(decider, Dialer((), None), host, port, protocol)

    async def egress_log(self, vm_id: str) -> EgressLog:
        if vm_id not in self.logs:
            self._place(vm_id)
        return self.logs.get(vm_id, EgressLog())

    async def put_file(self, vm_id: str, path: str, name: str, chunks: AsyncIterator[bytes]) -> StoredFile:
        place = self._place(vm_id)
        target = place.path(path)
        if path.endswith("/") or target.is_dir():
            target /= name
        if target.exists() and not target.is_file():
            raise FileError(f"{path} is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        part, size = target.with_name(target.name + ".part"), 0
        try:
            with part.open("wb") as file:
                async for chunk in chunks:
                    size += file.write(chunk)
                    if size > FILE_BYTES_MAX:
                        raise DiskFull(f"{path}: no space left (the sandbox's own disk)")
            part.rename(target)
        finally:
            part.unlink(missing_ok=True)
        return StoredFile("/" + str(target.relative_to(place.folder)), size)

    async def get_file(self, vm_id: str, path: str) -> AsyncGenerator[bytes, None]:
        target = self._place(vm_id).path(path)
        if target.is_dir():
            raise FileError(f"{path} is a directory")
        if not target.is_file():
            raise FileMissing(f"{path} is not there")
        with target.open("rb") as file:
            while data := file.read(64 << 10):
                yield data

    async def stage_env(self, vm_id: str, env: Mapping[str, str]) -> None:
        place = self._place(vm_id)
        place.env.update(env)
        sets = "import os; os.environ.update(" + repr(dict(env)) + ")"
        await self._python(place, Command(sets, "python", 60.0))

    async def adopted(self) -> Mapping[str, Started]:
        """Its sandboxes live as long as the test does: a second control on the same node finds them."""
        return {vm_id: place.started for vm_id, place in self.places.items()}

    async def leave(self) -> None:
        return

    async def suspend(self, vm_id: str) -> Stored:
        """Its processes are stopped where they are; that they still take memory is all that is wrong with it."""
        place = self._place(vm_id)
        for process in place.processes():
            process.send_signal(signal.SIGSTOP)
        self.resting[vm_id] = self.places.pop(vm_id)
        return Stored(vm_id, 1 << 20, 0, 1.0)

    async def fork(self, vm_id: str, specs: Sequence[SandboxSpec]) -> list[Started | InstaVMError]:
        return [UnsupportedOperationError("processes of this host can't be copied")] * len(specs)

    async def snapshot(self, vm_id: str, name: str) -> Stored:
        shutil.copytree(self._place(vm_id).folder, self._root / name)
        return self._stored_at(name)

    async def pull(self, name: str, ask: Pull, progress: Callable[[str], None]) -> Pulled:
        progress("looking")
        if "hangs" in ask.reference:
            await anyio.sleep_forever()
        if "missing" in ask.reference:
            raise SnapshotError(f"{ask.reference}: manifest unknown")
        (self._root / name / "app").mkdir(parents=True)
        return Pulled(self._stored_at(name), "sha256:" + "0" * 64, ask.env, {"made": "here"})

    async def prepare(self, name: str, vcpus: int, memory_mib: int) -> None:
        assert (self._root / name).is_dir()

    async def stored(self) -> Mapping[str, Stored]:
        snapshots = {name: self._stored_at(name) for name in os.listdir(self._root) if name.startswith("snap-")}
        return snapshots | {name: Stored(name, 1 << 20, 0) for name in self.resting}

    async def forget(self, name: str) -> None:
        if name.startswith("snap-"):
            shutil.rmtree(self._root / name, ignore_errors=True)
        elif (place := self.resting.pop(name, None)) is not None:
            for process in place.processes():
                process.kill()
                await process.wait()

    async def clear_up(self, *, dry_run: bool) -> Sequence[str]:
        return []

    def _stored_at(self, name: str) -> Stored:
        return Stored(name, sum(file.stat().st_size for file in (self._root / name).rglob("*")), 0)

    tier = Tier.EMULATED

    async def isolation(self, vm_id: str) -> Isolation:
        self._place(vm_id)
        return Isolation({"vm_id": vm_id, "tier": "emulated"}, "not signed", "no key")

    async def responds(self, within_s: float) -> bool:
        return True

    def memory(self) -> HostMemory:
        return self.host

    def _place(self, vm_id: str) -> Place:
        place = self.places.get(vm_id)
        if place is None:
            raise SessionEnded(f"there is no sandbox {vm_id} here")
        return place

    def on_end(self, callback: Callable[[Ended], None]) -> None:
        self._tell = callback

    async def metrics(self) -> NodeMetrics:
        return NodeMetrics(len(self.places), {"spare_machine": 0, "warm_machine": 0}, {}, {}, 0, 0)

    async def info(self) -> NodeInfo:
        return NodeInfo("local", "1", Tier.EMULATED, "processes of this host", {"default": "sha256:0"})

    def crash(self, vm_id: str) -> None:
        """What a node does when a VMM dies."""
        place = self.places.pop(vm_id)
        for process in place.processes():
            process.kill()
        self._tell(Ended(vm_id, EndReason.CRASHED, "the VMM exited with status 1", "[ 1.2] one\n[ 1.3] two"))

    async def _misbehave(self, spec: SandboxSpec) -> None:
        match spec.memory_mib:
            case 257:
                failed = BootFailed(f"{spec.vm_id} did not come up: the guest said nothing")
                failed.console = "Kernel panic - not syncing: VFS"
                raise failed
            case 258:
                await anyio.sleep_forever()
            case 259:
                raise NoCapacity("this host is full")
            case 261:
                await self.command_came.wait()
            case 260 if self.failures == 0:
                self.failures += 1
                raise BootFailed(f"{spec.vm_id} did not come up this once")

    async def _python(self, place: Place, command: Command) -> tuple[str, str, int]:
        assert place.python.stdin is not None
        assert place.python.stdout is not None
        place.python.stdin.write(json.dumps(command.code).encode() + b"\n")
        line = await place.python.stdout.readline()
        if not line:
            raise OutcomeUnknown(f"{place.spec.vm_id} was lost while the code ran")
        out, err, code = json.loads(line)
        return out, err, code

    async def _shell(self, place: Place, command: Command, on_output: OutputSink) -> tuple[str, str, int]:
        shell = await self._process(place.spec, place.folder, command.language, "-c", command.code)
        place.shells.add(shell)
        try:
            assert shell.stdout is not None
            assert shell.stderr is not None
            out = b""
            while piece := await shell.stdout.read(65536):
                on_output("stdout", piece)
                out += piece
            err = await shell.stderr.read()
            on_output("stderr", err)
            await shell.wait()
        finally:
            place.shells.discard(shell)
            if shell.returncode is None:
                shell.kill()
                await shell.wait()
        return out.decode(), err.decode(), shell.returncode or 0

    async def _process(self, spec: SandboxSpec, folder: Path, *argv: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *argv,
            cwd=folder / "app",
            env={
                "PATH": os.environ["PATH"],
                **spec.env,
                **(place.env if (place := self.places.get(spec.vm_id)) else {}),
            },
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 26,
        )


@asynccontextmanager
async def open_local_node(settings: Settings | None = None, *_: object) -> AsyncIterator[LocalNode]:
    """A server's lies in its state directory, which goes with the test also when the server was killed."""
    around = None if settings is None else settings.state_dir
    with tempfile.TemporaryDirectory(prefix="instavm-local-node-", dir=around) as root:
        yield LocalNode(Path(root))
