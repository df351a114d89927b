"""Snapshots: taken of sandboxes, or built from OCI images. One task per build, from `pending` to its end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import anyio
from anyio.abc import TaskGroup

from instavm import limits
from instavm.control.builds import steps
from instavm.control.ids import new_snapshot_id
from instavm.control.node import Node
from instavm.control.quotas import Quotas
from instavm.control.sessions import Session, Sessions
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import Store
from instavm.control.store.schema import LOCAL_TENANT
from instavm.control.store.snapshots import UNFINISHED, SnapshotRow
from instavm.errors import ForbiddenError, InstaVMError, NotFound, SnapshotError
from instavm.sandbox import Command, Pull, Stored, Stream
from instavm.wire.snapshots import CreateSnapshot
from instavm.wire.vms import CreateVm

log = logging.getLogger(__name__)

STEP_S: Final = 1800.0
"""How long one step of a build may take."""
BUILD_LIFETIME_S: Final = 4 * 3600
ON_HOST: Final = ("oci:", "oci-archive:", "docker-archive:")


@dataclass(slots=True, eq=False)
class Build:
    """One that is under way."""

    row: SnapshotRow
    text: str = ""
    left_out: int = 0
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    over: anyio.Event = field(default_factory=anyio.Event)

    def say(self, text: str) -> None:
        self.text += text
        over = len(self.text) - limits.SNAPSHOT_LOG_BYTES
        if over > limits.SNAPSHOT_LOG_BYTES:
            self.text = self.text[over:]
            self.left_out += over

    def hear(self, stream: Stream, data: bytes) -> None:
        if stream != "output":
            self.say(data.decode(errors="replace"))


class Snapshots:
    def __init__(self, node: Node, store: Store, sessions: Sessions, quotas: Quotas, tasks: TaskGroup) -> None:
        self._node = node
        self._rows = store.snapshots
        self._journal = store.journal
        self._sessions = sessions
        self._quotas = quotas
        self._tasks = tasks
        self._builds: dict[str, Build] = {}

    async def get(self, tenant: Tenant, snapshot_id: str) -> SnapshotRow:
        """Raises: NotFound, also for one of somebody else."""
        row = await self._find(snapshot_id)
        if row is None or (row.tenant_id != tenant.id and row.type != "system"):
            raise NotFound(f"there is no snapshot {snapshot_id[:80]}")
        return row

    async def bootable(self, tenant: Tenant, snapshot_id: str) -> SnapshotRow:
        """Raises: NotFound; SnapshotError: it is not ready."""
        row = await self.get(tenant, snapshot_id)
        if row.status != "ready":
            raise SnapshotError(f"snapshot {row.id} is {row.status}{': ' + row.last_error if row.last_error else ''}")
        return row

    async def of(self, tenant: Tenant, kind: str | None) -> list[SnapshotRow]:
        """A tenant's own and the system's, newest first."""
        found = await self._rows.of_tenant(tenant.id, kind)
        return [self._builds[row.id].row if row.id in self._builds else row for row in found]

    async def sizes(self) -> dict[str, Stored]:
        return dict(await self._node.stored())

    async def log_of(self, tenant: Tenant, snapshot_id: str, offset: int) -> tuple[SnapshotRow, str, int]:
        """What the build has printed from character `offset` on, and where to go on."""
        row = await self.get(tenant, snapshot_id)
        build = self._builds.get(row.id)
        text, left_out = (row.log, 0) if build is None else (build.text, build.left_out)
        return row, text[max(0, offset - left_out) :], left_out + len(text)

    async def build(self, tenant: Tenant, ask: CreateSnapshot) -> SnapshotRow:
        """Begin to build one and return at once. Raises: QuotaExceededError, ForbiddenError."""
        if ask.oci_image.startswith(ON_HOST) and tenant.id != LOCAL_TENANT:
            raise ForbiddenError("oci_image: images on the server's own disk are for the server's own account")
        if ask.type == "system" and tenant.id != LOCAL_TENANT:
            raise ForbiddenError("type: system snapshots are made by the server's own account")
        self._quotas.store(tenant, await self._sessions.at_rest_bytes(tenant))
        args = ask.build_args.model_dump(exclude_none=True)
        envs = args.pop("envs", {})
        row = SnapshotRow(
            id=new_snapshot_id(),
            tenant_id=tenant.id,
            name=ask.name,
            type=ask.type,
            status="pending",
            created_at=datetime.now(UTC),
            vcpus=ask.vcpu_count,
            memory_mib=ask.memory_mb,
            oci_image=ask.oci_image,
            build_args=args | ({"env_keys": sorted(envs)} if envs else {}),
        )
        build = self._builds[row.id] = Build(row)
        await self._journal.written(self._rows.add(row))
        self._tasks.start_soon(self._run, tenant, build, ask, name=row.id)
        return row

    async def take(self, tenant: Tenant, session: Session, name: str | None) -> SnapshotRow:
        """A snapshot of the disk of a session's sandbox, which goes on. Raises: as `Sessions.ready`, `Node.snapshot`."""
        vm = await self._sessions.ready(session)
        self._quotas.store(tenant, await self._sessions.at_rest_bytes(tenant))
        row = SnapshotRow(
            id=new_snapshot_id(),
            tenant_id=tenant.id,
            name=name,
            type="user",
            status="creating",
            created_at=datetime.now(UTC),
            vcpus=session.row.vcpus,
            memory_mib=session.row.memory_mib,
            vm_id=vm.id,
        )
        await self._journal.written(self._rows.add(row))
        try:
            stored = await self._node.snapshot(vm.id, row.id)
        except BaseException as exc:
            self._rows.remove(row.id)
            if isinstance(exc, InstaVMError):
                raise
            with anyio.CancelScope(shield=True):
                await self._node.forget(row.id)
            raise
        row = _ended(row, "ready", size_bytes=stored.own_bytes + stored.shared_bytes)
        await self._journal.written(self._rows.change(row))
        return row

    async def remove(self, tenant: Tenant, snapshot_id: str) -> SnapshotRow:
        """End its build, if it is under way, and remove it. What runs from it runs on. Raises: NotFound, ForbiddenError."""
        row = await self.get(tenant, snapshot_id)
        if row.tenant_id != tenant.id:
            raise ForbiddenError(f"snapshot {row.id} belongs to the server's own account")
        await self._end_build(row.id)
        await self._journal.written(self._rows.remove(row.id))
        await self._node.forget(row.id)
        return row

    async def cancel(self, tenant: Tenant, snapshot_id: str) -> SnapshotRow:
        """End a build; it is `failed` then. One that is over stays what it is. Raises: NotFound."""
        row = await self.get(tenant, snapshot_id)
        await self._end_build(row.id)
        return await self.get(tenant, snapshot_id)

    async def give_up(self) -> None:
        """Builds of a server that is no more: nobody goes on with them. Called once, at first."""
        for row in await self._rows.unfinished():
            self._rows.change(_ended(row, "failed", last_error="the server ended while it was built; build it again"))
            await self._node.forget(row.id)

    async def clear_up(self, *, dry_run: bool) -> list[str]:
        """Remove what belongs to nothing any more; what that was."""
        return list(await self._node.clear_up(dry_run=dry_run))

    async def _find(self, snapshot_id: str) -> SnapshotRow | None:
        build = self._builds.get(snapshot_id)
        return await self._rows.load(snapshot_id) if build is None else build.row

    async def _end_build(self, snapshot_id: str) -> None:
        if (build := self._builds.get(snapshot_id)) is not None:
            build.scope.cancel()
            await build.over.wait()

    async def _run(self, tenant: Tenant, build: Build, ask: CreateSnapshot) -> None:
        error: str | None = "it was cancelled"
        try:
            with build.scope:
                await self._make(tenant, build, ask)
                error = None
        except InstaVMError as exc:
            error = str(exc)
        except Exception:
            log.exception("the build of %s failed in a way that nobody foresaw", build.row.id)
            error = "internal error"
        finally:
            with anyio.CancelScope(shield=True):
                await self._finish(build, error)

    async def _finish(self, build: Build, error: str | None) -> None:
        if error is None:
            stored = (await self._node.stored())[build.row.id]
            ended = _ended(build.row, "ready", size_bytes=stored.own_bytes + stored.shared_bytes)
        else:
            build.say(f"\nfailed: {error}\n")
            ended = _ended(build.row, "failed", last_error=error)
            await self._node.forget(build.row.id)
        await self._journal.written(self._rows.change(replace(ended, log=build.text)))
        del self._builds[build.row.id]
        build.over.set()

    async def _make(self, tenant: Tenant, build: Build, ask: CreateSnapshot) -> None:
        self._change(build, status="building")
        password = ask.registry_password.get_secret_value() if ask.registry_password is not None else None
        args = ask.build_args
        pull = Pull(ask.oci_image, ask.registry_username, password, args.disk_size_gb, args.envs)
        pulled = await self._node.pull(build.row.id, pull, lambda line: build.say(line + "\n"))
        self._change(build, digest=pulled.digest, labels=pulled.labels)
        async with self._sandbox(tenant, build, ask) as vm_id:
            for step in steps(args.model_dump()):
                build.say(f"\n=> {step.name}: {step.command}\n")
                outcome = await self._node.execute(vm_id, Command(step.command, "sh", STEP_S), build.hear)
                if outcome.exit_code:
                    why = outcome.reason or f"exit code {outcome.exit_code}"
                    raise SnapshotError(
                        f"{step.name} failed ({why}): {(outcome.stderr or outcome.stdout).strip()[-1000:]}"
                    )
            if steps(args.model_dump()):
                build.say("\ntaking the snapshot\n")
                await self._node.snapshot(vm_id, build.row.id)
        build.say("booting it once, so that its sandboxes start fast\n")
        await self._node.prepare(build.row.id, ask.vcpu_count, ask.memory_mb)

    @asynccontextmanager
    async def _sandbox(self, tenant: Tenant, build: Build, ask: CreateSnapshot) -> AsyncIterator[str]:
        """A sandbox of the image, for as long as the block lasts. Booting it shows that the image runs."""
        build.say("booting a sandbox of it\n")
        wanted = CreateVm(
            vcpu_count=ask.vcpu_count,
            memory_mb=ask.memory_mb,
            vm_lifetime_seconds=BUILD_LIFETIME_S,
            metadata={"instavm.build": build.row.id},
        )
        session = await self._sessions.create(tenant, wanted, image=build.row.id)
        try:
            yield (await self._sessions.ready(session)).id
        finally:
            with anyio.CancelScope(shield=True):
                await self._sessions.kill(session)

    def _change(self, build: Build, **values: object) -> None:
        build.row = replace(build.row, **values)  # type: ignore[arg-type]
        self._rows.change(build.row)


def complete(row: SnapshotRow) -> bool:
    return row.status not in UNFINISHED


def _ended(row: SnapshotRow, status: str, *, size_bytes: int = 0, last_error: str | None = None) -> SnapshotRow:
    now = datetime.now(UTC)
    return replace(row, status=status, size_bytes=size_bytes, last_error=last_error, finished_at=now)
