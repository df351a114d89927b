"""Snapshots: taken of sandboxes, or built from OCI images. One task for each, from `pending` or `creating` to its end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import anyio
from anyio.abc import TaskGroup

from instavm import limits
from instavm.contract.node import Node
from instavm.contract.snapshots import Stored
from instavm.control.builds import Build, Builder
from instavm.control.egress import Egresses
from instavm.control.ids import new_snapshot_id
from instavm.control.quotas import Quotas
from instavm.control.sessions import Session, Sessions
from instavm.control.store.accounts import Tenant
from instavm.control.store.database import Store
from instavm.control.store.schema import LOCAL_TENANT
from instavm.control.store.snapshots import UNFINISHED, SnapshotRow
from instavm.control.vms import Vm
from instavm.errors import Conflict, ForbiddenError, InstaVMError, NotFound, RateLimitError, SnapshotError
from instavm.wire.snapshots import CreateSnapshot

log = logging.getLogger(__name__)

ON_HOST: Final = ("oci:", "oci-archive:", "docker-archive:")
STOPPED: Final = "the server ended while it was built; build it again"
LAST_S: Final = 120.0
"""How long the end of a sandbox waits for the snapshot that is to be taken before it."""


class Snapshots:
    def __init__(
        self, node: Node, store: Store, sessions: Sessions, egress: Egresses, quotas: Quotas, tasks: TaskGroup
    ) -> None:
        self._node = node
        self._builder = Builder(node, sessions, egress, quotas)
        self._rows = store.snapshots
        self._accounts = store.accounts
        self._journal = store.journal
        self._sessions = sessions
        self._quotas = quotas
        self._tasks = tasks
        self._builds: dict[str, Build] = {}
        self._stopping = False

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

    async def log_of(self, tenant: Tenant, snapshot_id: str) -> Build:
        """What its build has printed and how far it is; of one that is over, what is kept."""
        row = await self.get(tenant, snapshot_id)
        return self._builds.get(row.id) or Build(row, row.log, done=1)

    async def build(self, tenant: Tenant, ask: CreateSnapshot) -> SnapshotRow:
        """Begin to build one and return at once. Raises: QuotaExceededError, ForbiddenError; RateLimitError: too many at once."""
        if sum(one.row.tenant_id == tenant.id for one in self._builds.values()) >= limits.BUILDS_MAX:
            raise RateLimitError(
                f"this account has {limits.BUILDS_MAX} builds of snapshots under way, which is the limit; wait for some"
            )
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
        change = self._changing(build)
        self._tasks.start_soon(self._run, build, lambda: self._builder.make(tenant, build, ask, change), name=row.id)
        return row

    async def take(
        self, tenant: Tenant, session: Session, name: str | None, *, wait: bool = True, boot: bool = True
    ) -> SnapshotRow:
        """A snapshot of the disk of a session's sandbox, which goes on.

        boot: and then boot it once, so that its sandboxes start fast; it is `creating` until then. wait: for that.
        Raises: as `Sessions.ready`, `Node.snapshot`.
        """
        vm = await self._sessions.ready(session)
        self._quotas.store(tenant, await self._sessions.at_rest_bytes(tenant))
        row = await self._record(vm, session, name)
        try:
            row = await self._disk(row)
        except BaseException:
            self._rows.remove(row.id)
            raise
        if not boot:
            row = _ended(row, "ready", row.size_bytes)
            await self._recorded(row)
            return row
        build = self._boot(tenant, row)
        if wait:
            await build.over.wait()
        return build.row

    async def keep_last(self, vm: Vm) -> None:
        """Before the end of a sandbox: a snapshot of its disk, if its session wants one. One that fails says why."""
        session = self._sessions.of(vm)
        if session is None or not session.row.options.get("snapshot_on_terminate"):
            return
        row = await self._record(vm, session, session.row.options.get("snapshot_name"))
        error: str | None = f"it was not taken within {LAST_S:.0f} s"
        try:
            tenant = session.tenant or await self._accounts.tenant(row.tenant_id)
            self._quotas.store(tenant, await self._sessions.at_rest_bytes(tenant))
            with anyio.move_on_after(LAST_S):
                row = await self._disk(row)
                error = None
        except InstaVMError as exc:
            error = str(exc)
        if error is None and not self._stopping:
            self._boot(tenant, row)
            return
        await self._recorded(_ended(row, "ready" if error is None else "failed", row.size_bytes, error))

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
        """Those of a server that is no more: of builds nobody goes on with them, disks that are whole are good. At first."""
        whole = await self._node.stored()
        for row in await self._rows.unfinished():
            if row.status == "creating" and row.id in whole:
                self._rows.change(_ended(row, "ready", _size(whole[row.id])))
            else:
                self._rows.change(_ended(row, "failed", last_error=STOPPED))
                await self._node.forget(row.id)

    async def end_all(self) -> None:
        """Builds end with the server."""
        self._stopping = True
        for build in list(self._builds.values()):
            build.why = STOPPED
            build.scope.cancel()
            await build.over.wait()

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

    async def _record(self, vm: Vm, session: Session, name: str | None) -> SnapshotRow:
        row = SnapshotRow(
            id=new_snapshot_id(),
            tenant_id=session.row.tenant_id,
            name=name,
            type="user",
            status="creating",
            created_at=datetime.now(UTC),
            vcpus=session.row.vcpus,
            memory_mib=session.row.memory_mib,
            vm_id=vm.id,
        )
        await self._journal.written(self._rows.add(row))
        return row

    async def _disk(self, row: SnapshotRow) -> SnapshotRow:
        """Have it taken, whole or not at all. Raises: as `Node.snapshot`."""
        assert row.vm_id is not None
        try:
            return replace(row, size_bytes=_size(await self._node.snapshot(row.vm_id, row.id)))
        except InstaVMError:
            raise
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._node.forget(row.id)
            raise

    def _boot(self, tenant: Tenant, row: SnapshotRow) -> Build:
        """Begin to boot a disk that has been taken, and return at once."""
        build = self._builds[row.id] = Build(row)
        self._tasks.start_soon(self._run, build, lambda: self._first_start(tenant, build), name=row.id)
        return build

    async def _first_start(self, tenant: Tenant, build: Build) -> None:
        row = build.row
        build.enter("first start", "so that its sandboxes start fast")
        try:
            with self._quotas.booting(tenant, row.vcpus, row.memory_mib):
                await self._node.prepare(row.id, row.vcpus, row.memory_mib)
        except InstaVMError as exc:  # its disk is good all the same
            log.warning("%s could not be booted ahead of time: %s", row.id, exc)
            build.say(f"its first sandbox will have to boot: {exc}\n")

    async def _run(self, build: Build, work: Callable[[], Awaitable[None]]) -> None:
        error: str | None = STOPPED
        try:
            with build.scope:
                await work()
                error = None
            if build.scope.cancelled_caught:
                error = build.why
        except InstaVMError as exc:
            error = str(exc)
        except Exception:
            log.exception("the build of %s failed in a way that nobody foresaw", build.row.id)
            error = "internal error"
        finally:
            with anyio.CancelScope(shield=True):
                await self._finish(build, error)

    async def _finish(self, build: Build, error: str | None) -> None:
        if error is None or build.row.status == "creating":
            build.row = _ended(build.row, "ready", _size((await self._node.stored())[build.row.id]))
        else:
            build.say(f"\nfailed: {error}\n")
            build.row = _ended(build.row, "failed", last_error=error)
            await self._node.forget(build.row.id)
        try:
            await self._recorded(replace(build.row, log=build.text))
        except Conflict as exc:
            log.warning("%s was removed while it was made: %s", build.row.id, exc)
        finally:
            del self._builds[build.row.id]
            build.over.set()

    async def _recorded(self, row: SnapshotRow) -> None:
        """Record how it ended; durable when it returns. Raises: Conflict: it was removed meanwhile, and its disk is too."""
        try:
            await self._journal.written(self._rows.change(row))
        except Conflict:
            await self._node.forget(row.id)
            raise

    def _changing(self, build: Build) -> Callable[..., None]:
        def change(**values: object) -> None:
            build.row = replace(build.row, **values)  # type: ignore[arg-type]
            self._rows.change(build.row)

        return change


def _size(stored: Stored) -> int:
    return stored.own_bytes + stored.shared_bytes


def complete(row: SnapshotRow) -> bool:
    return row.status not in UNFINISHED


def _ended(row: SnapshotRow, status: str, size_bytes: int = 0, last_error: str | None = None) -> SnapshotRow:
    now = datetime.now(UTC)
    return replace(row, status=status, size_bytes=size_bytes, last_error=last_error, finished_at=now)
