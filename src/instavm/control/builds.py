"""A build: an image is fetched, a sandbox of it adds what was asked for, and what came of that is booted once."""

from __future__ import annotations

import logging
import shlex
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import urlsplit

import anyio

from instavm import limits
from instavm.contract.egress import Egress
from instavm.contract.executions import Command, Stream
from instavm.contract.node import Node
from instavm.contract.snapshots import Pull
from instavm.control.egress import Egresses
from instavm.control.quotas import Quotas
from instavm.control.sessions import Session, Sessions
from instavm.control.store.accounts import Tenant
from instavm.control.store.snapshots import SnapshotRow
from instavm.errors import HostNotReady, InstaVMError, SnapshotError
from instavm.wire.egress import SetEgress, domain
from instavm.wire.snapshots import CreateSnapshot
from instavm.wire.vms import CreateVm

log = logging.getLogger(__name__)

REPOSITORY: Final = "/app/repo"
STEP_S: Final = 1800.0
"""How long one step of a build may take."""
LIFETIME_S: Final = 4 * 3600
ADDS_MANAGERS: Final = "apt packages"
"""The step after which an image may have package managers that it did not have before."""
REFUSED_MAX: Final = 8


@dataclass(slots=True, eq=False)
class Build:
    """One that is under way."""

    row: SnapshotRow
    text: str = ""
    left_out: int = 0
    stages: int = 1
    stage: str = ""
    done: int = -1
    """Stages that are over."""
    why: str = "it was cancelled"
    """What its end means when its scope is cancelled."""
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    over: anyio.Event = field(default_factory=anyio.Event)

    @property
    def progress(self) -> float:
        return max(0, self.done) / self.stages

    def enter(self, stage: str, about: str = "") -> None:
        self.stage, self.done = stage, self.done + 1
        self.say(f"=> {stage}{': ' if about else ''}{about}\n")

    def say(self, text: str) -> None:
        self.text += text
        over = len(self.text) - limits.SNAPSHOT_LOG_BYTES
        if over > limits.SNAPSHOT_LOG_BYTES:
            self.text = self.text[over:]
            self.left_out += over

    def hear(self, stream: Stream, data: bytes) -> None:
        if stream != "output":
            self.say(data.decode(errors="replace"))


class Builder:
    def __init__(self, node: Node, sessions: Sessions, egress: Egresses, quotas: Quotas) -> None:
        self._node = node
        self._sessions = sessions
        self._egress = egress
        self._quotas = quotas

    async def make(self, tenant: Tenant, build: Build, ask: CreateSnapshot, change: Callable[..., None]) -> None:
        """From `pending` to a disk that has been booted. change: of the build's row. Raises: InstaVMError, says why."""
        change(status="building")
        todo = steps(ask.build_args.model_dump())
        build.stages = 3 + len(todo) + bool(todo)
        build.enter("fetch")
        password = ask.registry_password.get_secret_value() if ask.registry_password is not None else None
        pull = Pull(ask.oci_image, ask.registry_username, password, ask.build_args.disk_size_gb, ask.build_args.envs)
        pulled = await self._node.pull(build.row.id, pull, lambda line: build.say(line + "\n"))
        change(digest=pulled.digest, labels=pulled.labels)
        build.enter("boot")
        async with self._sandbox(tenant, build, ask) as session:
            vm = await self._sessions.ready(session)
            if todo:
                egress = reach(ask)
                await self._open(build, session, egress, must=ask.egress_policy is not None)
            for step in todo:
                await self._run(build, session, vm.id, step)
                if step.name == ADDS_MANAGERS and step is not todo[-1] and egress.packages:
                    await self._node.ask_registries(vm.id)
                    await self._open(build, session, egress, must=False)
            if todo:
                build.enter("snapshot")
                await self._node.snapshot(vm.id, build.row.id)
        build.enter("first start", "so that its sandboxes start fast")
        with self._quotas.booting(tenant, ask.vcpu_count, ask.memory_mb):
            await self._node.prepare(build.row.id, ask.vcpu_count, ask.memory_mb)
        build.done += 1

    async def _run(self, build: Build, session: Session, vm_id: str, step: Step) -> None:
        build.enter(step.name, step.command)
        outcome = await self._node.execute(vm_id, Command(step.command, "sh", STEP_S), build.hear)
        if not outcome.exit_code:
            return
        why = outcome.reason or f"exit code {outcome.exit_code}"
        text = f"{step.name} failed ({why}): {(outcome.stderr or outcome.stdout).strip()[-1000:]}"
        if refused := await self._refused(session):
            text += f" [the build's network refused {', '.join(refused)}: see egress_policy]"
        raise SnapshotError(text)

    async def _open(self, build: Build, session: Session, egress: Egress, *, must: bool) -> None:
        """must: what was asked for by name is not left out. Raises: HostNotReady."""
        try:
            await self._egress.set_session(session, egress)
        except HostNotReady as exc:
            if must:
                raise
            build.say(f"it has no network: {exc}\n")

    async def _refused(self, session: Session) -> list[str]:
        """Where the build wanted to go and may not."""
        try:
            _, told = await self._egress.log(session)
        except InstaVMError:
            return []
        return list(dict.fromkeys(one.name or f"{one.address}:{one.port}" for one in told.seen if not one.allowed))[
            :REFUSED_MAX
        ]

    @asynccontextmanager
    async def _sandbox(self, tenant: Tenant, build: Build, ask: CreateSnapshot) -> AsyncIterator[Session]:
        """A sandbox of the image, for as long as the block lasts. Booting it shows that the image runs."""
        allowed_s = self._quotas.of(tenant).lifetime_s
        wanted = CreateVm(
            vcpu_count=ask.vcpu_count,
            memory_mb=ask.memory_mb,
            vm_lifetime_seconds=LIFETIME_S if allowed_s is None else max(20, min(LIFETIME_S, allowed_s)),
            metadata={"instavm.build": build.row.id},
            egress_policy=SetEgress(),
        )
        session = await self._sessions.create(tenant, wanted, image=build.row.id)
        try:
            yield session
        finally:
            with anyio.CancelScope(shield=True):
                await self._sessions.kill(session)


@dataclass(frozen=True, slots=True)
class Step:
    """A shell command; the sandbox has only what the image has."""

    name: str
    command: str


def steps(args: Mapping[str, Any]) -> list[Step]:
    """In the order in which later ones may need earlier ones: packages of system and languages, sources, the user's own."""
    found = []
    if words := _words(args, "extra_apt_packages"):
        found.append(
            Step(
                "apt packages",
                "export DEBIAN_FRONTEND=noninteractive; apt-get update -q && "
                f"apt-get install -q -y --no-install-recommends -- {words} && rm -rf /var/lib/apt/lists/*",
            )
        )
    if words := _words(args, "extra_pip_packages"):
        pip = "$(command -v python3 || command -v python || echo python3) -m pip"
        found.append(Step("pip packages", f"{pip} install --no-cache-dir --disable-pip-version-check {words}"))
    if words := _words(args, "extra_npm_packages"):
        found.append(Step("npm packages", f"npm install --global --no-fund --no-audit -- {words}"))
    if args.get("git_clone_url"):
        branch = f"--branch {shlex.quote(args['git_clone_branch'])} " if args.get("git_clone_branch") else ""
        url = shlex.quote(args["git_clone_url"])
        found.append(Step("git clone", f"git clone --depth 1 {branch}-- {url} {REPOSITORY}"))
    if args.get("post_build_cmd"):
        found.append(Step("post_build_cmd", str(args["post_build_cmd"])))
    return found


def reach(ask: CreateSnapshot) -> Egress:
    """What the sandbox of a build may reach: its package registries, if its policy does not say otherwise, what that
    policy names, and the host that sources are cloned from.
    """
    policy = ask.egress_policy or SetEgress()
    named = policy.egress()
    if policy.allow_package_managers is None and policy.allow_public_repos is None:
        named = replace(named, packages=True)
    host = _host(ask.build_args.git_clone_url or "")
    listed = named.domains or named.cidrs
    if host is None or host in named.domains or ((named.http or named.https) and not listed):
        return named  # with nothing listed, the flags open every host; a list would narrow them
    return replace(named, domains=(*named.domains, host))


def _host(url: str) -> str | None:
    """Of a URL over HTTP. An address has to be named by a range, which says how much of it is meant."""
    try:
        parts = urlsplit(url)
        return domain(parts.hostname or "") if parts.scheme in ("http", "https") else None
    except ValueError:
        return None


def _words(args: Mapping[str, Any], name: str) -> str:
    return " ".join(shlex.quote(word) for word in (args.get(name) or "").split())
