"""The networks of all sandboxes on this host, and the filter's process, which the server starts, watches and replaces.

While there is no filter nothing gets through, whatever the rules say: it alone has the sockets that lead on.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio

from instavm.contract.egress import Egress, EgressDecision, EgressLog, Seen
from instavm.errors import HostNotReady
from instavm.node import precedence
from instavm.node.network import rules, space
from instavm.node.network.policy import Policy, Registry, from_wire, registry, to_wire
from instavm.node.network.space import Space
from instavm.node.network.witness import Witness
from instavm.settings import Settings

log = logging.getLogger(__name__)

MESSAGE_MAX: Final = 4 << 20
SO_SNDBUFFORCE: Final = 32
ANSWER_S: Final = 10.0
"""A filter that does not answer within this time is killed and replaced."""
BEGIN_S: Final = 120.0
"""How long a filter may take to start up while others have the CPU."""
STOPPED: Final = ("T", "t")
"""Of a process that was stopped by a signal, or by a debugger."""
AGAIN_S: Final = 0.2
"""Pause before a filter that ended is replaced, so that one that can't live does not take the whole CPU."""


@dataclass(frozen=True, slots=True)
class InForce:
    """What holds for one sandbox. `sha256`: of all of it, kernel's and filter's; equal rules have the same."""

    sha256: str
    kernel_rules: int
    policy: Egress


@dataclass(eq=False, slots=True)
class Network:
    """One sandbox's. Closed by whoever has its machine."""

    name: str
    space: Space
    networks: Networks
    policy: Policy
    changing: anyio.Lock = field(default_factory=anyio.Lock)
    witness: Witness = field(init=False)

    def __post_init__(self) -> None:
        assert self.space.filter_log is not None, "it has just been made"
        self.witness = Witness(self.space.kernel_log, self.space.filter_log)

    @property
    def tap(self) -> int:
        """For the VMM to inherit."""
        return self.space.tap

    async def put(self, egress: Egress, registries: Iterable[Registry]) -> None:
        """In force when it returns. Raises HostNotReady; then nothing gets through."""
        policy = Policy(egress, [*registries, *self.networks.registries])
        try:
            await self._put_or_close(policy)
        except HostNotReady:  # the filter was replaced meanwhile: the new one is told as well
            await self._put_or_close(policy)

    async def _put_or_close(self, policy: Policy) -> None:
        await self.networks.ready()
        async with self.changing:
            try:
                await self._put(policy)
            except BaseException:
                with anyio.CancelScope(shield=True), contextlib.suppress(HostNotReady):
                    await self._put(_closed(policy))
                raise

    async def _put(self, policy: Policy) -> None:
        self.policy = _closed(policy)
        await self.networks.ask("put", self.name, **self.networks.told(policy))
        await anyio.to_thread.run_sync(space.apply, self.space, rules.allowing(policy))
        self.policy = policy

    async def check(self, host: str, port: int, protocol: str, egress: Egress | None) -> EgressDecision:
        """What the filter says. egress: decide by this, not by what is in force. Raises HostNotReady."""
        policy = None if egress is None else Policy(egress, self.policy.registries.values())
        return await self.networks.check(self.name, policy, host, port, protocol)

    async def log(self) -> EgressLog:
        """Raises HostNotReady."""
        said = await self.networks.asked("log", self.name)
        kernel = rules.refused(await anyio.to_thread.run_sync(space.apply, self.space, rules.LIST_REFUSED))
        seen = [Seen(*entry) for entry in said["entries"]]
        return EgressLog((*seen, *kernel), said["sent"], said["received"], said["open"])

    async def in_force(self) -> InForce:
        """What kernel and filter go by at this moment, asked of both. Raises HostNotReady (there is no filter)."""
        said = await self.networks.asked("policy", self.name)
        kernel = rules.in_force(await anyio.to_thread.run_sync(space.apply, self.space, rules.LIST_ALL))
        policy = from_wire(said["told"]["policy"]).egress
        both = json.dumps({"filter": said["told"], "kernel": kernel}, sort_keys=True).encode()
        return InForce(hashlib.sha256(both).hexdigest(), sum("rule" in one for one in kernel), policy)

    async def aclose(self) -> None:
        """Twice is fine."""
        with anyio.CancelScope(shield=True):
            self.networks.forget(self)
            await anyio.to_thread.run_sync(self.space.close)


class Networks:
    def __init__(self, settings: Settings, closed_ports: Iterable[int] = ()) -> None:
        """closed_ports: TCP ports of this host that no policy opens."""
        self._settings = settings
        self._closed_ports = sorted(closed_ports)
        self._live: dict[str, Network] = {}
        self._names = itertools.count(1)
        self._ids = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._ready = anyio.Event()
        """Set while there is a filter that has been told everything."""
        self._waiting: dict[int, tuple[anyio.Event, list[dict[str, Any]]]] = {}
        self.registries = [registry(text) for text in settings.egress_package_hosts]
        self.refusal: str | None = None
        """Why this host can give sandboxes no network; None when it can."""
        self.filter_pid: int | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Raises HostNotReady, only for settings that can't be meant."""
        self.refusal = await anyio.to_thread.run_sync(space.lacking)
        if self.refusal is not None:
            log.warning("sandboxes have no network here: %s", self.refusal)
            yield
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_filter)
            tasks.start_soon(anyio.to_thread.run_sync, space.preload)
            yield
            tasks.cancel_scope.cancel()

    def __len__(self) -> int:
        return len(self._live)

    async def make(self, registries: Iterable[Registry] = ()) -> Network | None:
        """A new network, closed to everything; None where this host can't. Raises HostNotReady.

        registries: so that its log can tell them apart.
        """
        if self.refusal is not None:
            return None
        return await self._take_on(await anyio.to_thread.run_sync(space.make), registries)

    async def adopt(self, pid: int) -> Network | None:
        """The network of a VMM that an earlier server started, closed to everything; None: it has none. Raises HostNotReady."""
        found = None if self.refusal is not None else await anyio.to_thread.run_sync(space.adopt, pid)
        return None if found is None else await self._take_on(found, ())

    async def _take_on(self, made: Space, registries: Iterable[Registry]) -> Network:
        network = Network(str(next(self._names)), made, self, Policy(Egress(), [*registries, *self.registries]))
        self._live[network.name] = network
        try:
            if self._ready.is_set():  # else it is told with all others, once there is a filter
                self._hand_over(network)
        except BaseException:
            await network.aclose()
            raise
        return network

    def told(self, policy: Policy) -> dict[str, Any]:
        """What the filter must know of one sandbox."""
        return {"policy": to_wire(policy), "closed_ports": self._closed_ports}

    async def ready(self) -> None:
        """Wait until there is a filter. Raises HostNotReady."""
        if not self._ready.is_set():
            self._hurry()
        try:
            with anyio.fail_after(ANSWER_S):
                await self._ready.wait()
        except TimeoutError as exc:
            raise HostNotReady("the egress filter does not come up") from exc

    async def check(self, name: str, policy: Policy | None, host: str, port: int, protocol: str) -> EgressDecision:
        """Asked of the filter itself. policy: None: what it goes by for the network `name`. Raises HostNotReady."""
        by = None if policy is None else self.told(policy)
        said = await self.asked("check", name, host=host, port=port, protocol=protocol, by=by)
        return EgressDecision(*said["decision"])

    def _hand_over(self, network: Network) -> None:
        """Give the filter the sockets of a network. It is closed until a `put` is answered, so nobody waits for this."""
        fds = [one.fileno() for one in network.space.sockets]
        self._tell("open", network.name, fds, **self.told(network.policy))

    async def _hand_over_when_settled(self, name: str) -> None:
        """With the policy that a change under way ends with."""
        if (network := self._live.get(name)) is not None:
            async with network.changing:
                if name in self._live:
                    self._hand_over(network)

    def forget(self, network: Network) -> None:
        if self._live.pop(network.name, None) is not None:
            self._tell("close", network.name)

    def stopped(self) -> bool:
        """Whether the filter's process is stopped, so that it is no use to wait for an answer."""
        if self.filter_pid is None:
            return False
        try:
            state = Path(f"/proc/{self.filter_pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state in STOPPED

    async def asked(self, what: str, name: str, **more: Any) -> dict[str, Any]:
        """The filter's answer; that of its successor, when it had to be replaced. Raises HostNotReady."""
        await self.ready()
        try:
            return await self.ask(what, name, **more)
        except HostNotReady:
            await self.ready()
            return await self.ask(what, name, **more)

    async def ask(
        self, what: str, name: str = "", fds: Iterable[int] = (), *, within_s: float = ANSWER_S, **more: Any
    ) -> dict[str, Any]:
        """Raises HostNotReady: there is no filter, or it refuses."""
        process = self._process
        if self.stopped():
            self._replace("its process was stopped by a signal")
        number, event, answer = next(self._ids), anyio.Event(), list[dict[str, Any]]()
        self._waiting[number] = (event, answer)
        try:
            self._tell(what, name, fds, number, **more)
            with anyio.fail_after(within_s):
                await event.wait()
        except TimeoutError as exc:
            if process is self._process:
                self._replace(f"it has not answered for {within_s:.0f} s")
            raise HostNotReady(f"the egress filter did not answer within {within_s:.0f} s; it is replaced") from exc
        finally:
            del self._waiting[number]
        if not answer or "error" in answer[0]:
            raise HostNotReady(f"the egress filter: {answer[0]['error'] if answer else 'it has ended'}")
        return answer[0]

    def _tell(self, what: str, name: str = "", fds: Iterable[int] = (), number: int = 0, **more: Any) -> None:
        """Send the filter a message, in order. Without a filter nothing is sent: a new one is told everything.

        number: of the answer that is waited for; 0 when none is.
        """
        if self._line is None or self._process is None:
            if number:
                raise HostNotReady("the egress filter is not running")
            return
        message = json.dumps({"id": number, "do": what, "name": name, **more}).encode()
        try:
            socket.send_fds(self._line, [message], list(fds))
        except OSError as exc:  # it has just ended; or megabytes lie unread, so that it will not catch up
            self._replace(str(exc))
            if number:
                raise HostNotReady(f"the egress filter is replaced: {exc}") from exc

    def _replace(self, why: str) -> None:
        """Kill the filter; `_keep_filter` starts another one. Until that is ready nothing gets through."""
        if self._process is not None:
            log.error("the egress filter is replaced: %s", why)
            self._process.kill()
            self._line, self._ready = None, anyio.Event()

    async def _keep_filter(self) -> None:
        while True:
            process, line = _spawn()
            self._process, self._line, self.filter_pid = process, line, process.pid
            if self._live:
                self._hurry()
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._hear, line, tasks.cancel_scope)
                    if not await self._begin():
                        tasks.cancel_scope.cancel()
                    await anyio.sleep_forever()
            finally:
                self._process = self._line = self.filter_pid = None
                if self._ready.is_set():  # else there are those who wait on it already
                    self._ready = anyio.Event()
                line.close()
                process.kill()
                process.wait()
                self._all_unanswered()
            log.error("the egress filter has ended; nothing gets through until there is another one")
            await anyio.sleep(AGAIN_S)

    async def _begin(self) -> bool:
        """Tell a new filter everything. Returns: False, when it can't be told: it is replaced like one that ended."""
        settings = self._settings
        rate = settings.egress_mbit_per_s
        try:
            await self.ask(
                "begin",
                within_s=BEGIN_S,
                dns=list(settings.egress_dns),
                proxy=settings.egress_proxy,
                connections=settings.egress_connections,
                bytes_per_s=None if rate is None else rate * 125_000,
            )
            handed: set[str] = set()
            while left := self._live.keys() - handed:  # some come while others are handed over
                handed |= left
                for name in left:
                    await self._hand_over_when_settled(name)
                await self.ask("ready", within_s=BEGIN_S)  # it has taken up these
        except HostNotReady as exc:
            log.error("the egress filter could not be set up: %s", exc)
            return False
        self._hurry()
        self._ready.set()
        return True

    def _hurry(self) -> None:
        """From here on it gets its share of the CPU; it started up only when nobody else wanted that."""
        if self.filter_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(self.filter_pid, os.SCHED_OTHER, os.sched_param(0))

    async def _hear(self, line: socket.socket, around: anyio.CancelScope) -> None:
        while True:
            await anyio.wait_readable(line)
            try:
                data = line.recv(MESSAGE_MAX)
            except ConnectionResetError:
                data = b""
            if not data:
                around.cancel()
                return
            message = json.loads(data)
            if message["id"] == 0 and "error" in message:
                log.error("the egress filter: %s", message["error"])
            if (waiting := self._waiting.get(message["id"])) is not None:
                waiting[1].append(message)
                waiting[0].set()

    def _all_unanswered(self) -> None:
        for event, _ in self._waiting.values():
            event.set()


def _spawn() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, MESSAGE_MAX)
        ours.setblocking(False)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "instavm.node.network.filter", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={"LANG": "C.UTF-8", "PATH": os.defpath},
        )
    precedence.like_everybody(process.pid)
    os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    return process, ours


def _closed(policy: Policy) -> Policy:
    return Policy(Egress(), policy.registries.values())
