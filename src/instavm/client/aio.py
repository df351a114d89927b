"""`AsyncInstaVM`: the same sandbox for a program with an event loop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, Unpack

import anyio
import anyio.to_thread

from instavm import limits
from instavm.client.binding import Binding, vm_of
from instavm.client.branches import AsyncBranches
from instavm.client.calls import executions, files, isolation, sessions, snapshots, tasks, users, vms
from instavm.client.calls.egress import Policy
from instavm.client.config import Config
from instavm.client.egress import AsyncEgress
from instavm.client.managers import Manager
from instavm.client.places import LocalPath, in_threads, landing, local_path, source
from instavm.client.processes import AsyncProcesses
from instavm.client.results import (
    AppUrl,
    DownloadedFile,
    EgressPolicy,
    Execution,
    Isolation,
    Resumed,
    Sandbox,
    SessionInfo,
    SessionStatus,
    SessionUsage,
    Suspended,
    Task,
    TaskBegun,
    UploadedFile,
    User,
)
from instavm.client.streaming import Reader, StreamEvent, follow_async
from instavm.client.transport import AsyncLink
from instavm.errors import InstaVMError, SessionError


class AsyncInstaVM(Binding):
    """`async with AsyncInstaVM(api_key=...) as vm: await vm.execute("print(6 * 7)")`.

    Everything is as in `InstaVM`, where each argument and method is described; only that the session is made
    when the `async with` block is entered, or by the first call that needs it.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: int = limits.LIFETIME_S_DEFAULT,
        max_retries: int = 0,
        *,
        cpu_count: int | None = None,
        memory_mb: int | None = None,
        env: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        require_isolation: str | None = None,
        auto_start_session: bool = True,
    ) -> None:
        config = Config.of(
            api_key,
            base_url,
            timeout,
            max_retries,
            cpu_count=cpu_count,
            memory_mb=memory_mb,
            env=env,
            metadata=metadata,
            require_isolation=require_isolation,
        )
        self._build(config)
        self._auto_start = auto_start_session

    def _build(self, config: Config) -> None:
        super()._build(config)
        self._auto_start = False
        self._link = AsyncLink(config)
        self.processes = AsyncProcesses(self._link, self._session)
        """Programs that run in the background."""
        self.egress = AsyncEgress(self._link, self._session)
        self.vms = Manager(self._link.send, vms.CALLS)
        self.snapshots = Manager(self._link.send, snapshots.CALLS)

    def after_fork(self) -> None:
        self._starting = anyio.Lock()

    async def start_session(self) -> str:
        """Make a new session and use it from now on. Returns: its id."""
        return self._bound(await self._link.send(sessions.create(self._config.api_key, self._config.session)))

    async def execute(self, code: str, language: str = "python", timeout: float | None = None) -> Execution:
        """As `InstaVM.execute`."""
        return await self._link.send(executions.execute(await self._session(), code, language, timeout))

    async def suspend(self) -> Suspended:
        """As `InstaVM.suspend`."""
        return await self._link.send(vms.suspend(await self._vm_id()))

    async def resume(self) -> Resumed:
        """As `InstaVM.resume`."""
        return await self._link.send(vms.resume(await self._vm_id()))

    async def fork(self, count: int = 1, env: Mapping[str, Any] | None = None) -> list[AsyncInstaVM]:
        """As `InstaVM.fork`."""
        if self.session_id is None or not await self.is_session_active():
            await self.execute("None")
        made = await self._link.send(vms.fork(await self._vm_id(), count, env))
        return [self._copy(one["session_id"]) for one in made.forks]

    @asynccontextmanager
    async def branch(self, count: int) -> AsyncIterator[AsyncBranches]:
        """As `InstaVM.branch`."""
        tries = AsyncBranches(await self.fork(count))
        try:
            yield tries
        except BaseException:
            tries.kept = None
            raise
        finally:
            with anyio.CancelScope(shield=True):
                for one in tries:
                    if one is not tries.kept:
                        await one.close_session()
                    await one.close()
        if tries.kept is not None:
            was, self.session_id = self.session_id, tries.kept.session_id
            await self._link.send(sessions.kill(str(was)))

    async def _vm_id(self) -> str:
        return vm_of(await self._link.send(sessions.info(await self._session())))

    async def execute_async(self, code: str, language: str = "python", timeout: float | None = None) -> TaskBegun:
        """As `InstaVM.execute_async`."""
        return await self._link.send(tasks.begin(await self._session(), code, language, timeout))

    async def get_task_result(self, task_id: str, poll_interval: float = 1.0, timeout: float = 60.0) -> Task:
        """As `InstaVM.get_task_result`."""
        deadline = time.monotonic() + timeout
        while not (task := await self._link.send(tasks.get(task_id)))["is_complete"]:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"task {task_id} has not ended after {timeout:g} s; it runs on")
            await anyio.sleep(poll_interval)
        return task

    async def upload_file(self, file_path: LocalPath, remote_path: files.RemotePath) -> UploadedFile:
        """As `InstaVM.upload_file`."""
        local = local_path(file_path, "file_path")
        call, around = files.upload(await self._session(), local, remote_path)
        async with in_threads(source(local)) as file:
            return await self._link.upload(call, around, file)

    async def download_file(self, filename: files.RemotePath, local_path: LocalPath | None = None) -> DownloadedFile:
        """As `InstaVM.download_file`."""
        call = files.download(await self._session(), filename)
        async with in_threads(landing(files.remote_path(filename, "filename"), local_path)) as (file, result):
            result["size"] = await self._link.download(call, file)
        return result

    async def get_session_app_url(self, session_id: str | None = None, port: int = 80) -> AppUrl:
        """As `InstaVM.get_session_app_url`."""
        return await self._link.send(sessions.app_url(session_id or await self._session(), port))

    async def stream(
        self, code: str, language: str = "python", timeout: float | None = None
    ) -> AsyncIterator[StreamEvent]:
        """As `InstaVM.stream`: `async for event in vm.stream(...)`."""
        async for event in follow_async(self._link, Reader(await self._session(), code, language, timeout)):
            yield event

    async def cancel(self, execution_id: str) -> bool:
        """As `InstaVM.cancel`."""
        return await self._link.send(executions.cancel(execution_id))

    async def kill(self, session_id: str | None = None) -> None:
        """As `InstaVM.kill`."""
        if (target := session_id or self.session_id) is not None:
            await self._link.send(sessions.kill(target))
        self._forget(session_id)

    async def close_session(self) -> None:
        """As `InstaVM.close_session`."""
        try:
            await self.kill()
        except SessionError:
            self._forget(None)

    async def close(self) -> None:
        """As `InstaVM.close`."""
        await self._link.aclose()

    async def get_session_info(self, session_id: str | None = None) -> SessionInfo:
        """As `InstaVM.get_session_info`."""
        return await self._link.send(sessions.info(session_id or await self._session()))

    async def get_session_status(self, session_id: str | None = None) -> SessionStatus:
        """As `InstaVM.get_session_status`."""
        return await self._link.send(sessions.status(session_id or await self._session()))

    async def is_session_active(self, session_id: str | None = None) -> bool:
        """As `InstaVM.is_session_active`."""
        try:
            return (await self.get_session_status(session_id)).vm_status == "active"
        except InstaVMError:
            return False

    async def get_isolation(self, vm_id: str | None = None) -> Isolation:
        """As `InstaVM.get_isolation`."""
        target = vm_id or (await self.get_session_info())["vm_id"] or ""
        return await self._link.send(isolation.get(target))

    async def get_usage(self, session_id: str | None = None) -> SessionUsage:
        """As `InstaVM.get_usage`."""
        return await self._link.send(sessions.usage(session_id or await self._session()))

    async def list_sandboxes(
        self, metadata: Mapping[str, Any] | None = None, limit: int = limits.LIST_LIMIT_DEFAULT
    ) -> list[Sandbox]:
        """As `InstaVM.list_sandboxes`."""
        return await self._link.send(sessions.sandboxes(metadata, limit))

    async def set_session_egress(self, session_id: str | None = None, **policy: Unpack[Policy]) -> EgressPolicy:
        """As `egress.set_session`."""
        return await self.egress.set_session(session_id, **policy)

    async def get_session_egress(self, session_id: str | None = None) -> EgressPolicy:
        """As `egress.get_session`."""
        return await self.egress.get_session(session_id)

    async def set_vm_egress(self, vm_id: str, **policy: Unpack[Policy]) -> EgressPolicy:
        """As `egress.set_vm`."""
        return await self.egress.set_vm(vm_id, **policy)

    async def get_vm_egress(self, vm_id: str) -> EgressPolicy:
        """As `egress.get_vm`."""
        return await self.egress.get_vm(vm_id)

    async def get_current_user(self) -> User:
        """As `InstaVM.get_current_user`."""
        return await self._link.send(users.me())

    async def __aenter__(self) -> Self:
        self._own()
        if self._auto_start:
            await self._session()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Being cancelled leaves no sandbox behind: the kill is shielded, and has a deadline of its own."""
        with anyio.CancelScope(shield=True):
            try:
                if self._is_own:
                    await self.close_session()
            except InstaVMError as failed:
                if exc is None:
                    raise
                exc.add_note(f"its sandbox could not be ended either: {failed}")
            finally:
                await self.close()

    async def _session(self) -> str:
        async with self._starting:
            return self._known_session() or await self.start_session()
