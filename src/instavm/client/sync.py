"""`InstaVM`: a sandbox in a program without an event loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, Unpack

from instavm import limits
from instavm.client.binding import Binding, vm_of
from instavm.client.branches import Branches
from instavm.client.calls import executions, files, isolation, sessions, snapshots, tasks, users, vms
from instavm.client.calls.egress import Policy
from instavm.client.config import Config
from instavm.client.egress import Egress
from instavm.client.managers import Manager
from instavm.client.places import LocalPath, landing, local_path, source
from instavm.client.processes import Processes
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
from instavm.client.streaming import Reader, StreamEvent, follow
from instavm.client.transport import Link
from instavm.errors import InstaVMError, SessionError


class InstaVM(Binding):
    """A sandbox of one's own: `with InstaVM(api_key=...) as vm: vm.execute("print(6 * 7)")`.

    The constructor makes a session, whose sandbox begins to boot at once; the first `execute` waits for it.
    Leaving the `with` block ends the sandbox, whatever happened inside; only not in a process that was forked inside.
    Safe to share between threads, and with forked processes.

    api_key: else INSTAVM_API_KEY. With the embedded server any text will do.
    base_url: else INSTAVM_BASE_URL; without either, one server per user is started on this machine.
    timeout: lifetime of the sandbox in seconds, 20 to 86400, counted from when it is ready.
    max_retries: how often a call is repeated when the server cannot be reached. Code that was sent is never
    sent twice.
    cpu_count: 1 to 8. memory_mb: 256 to 8192. env: variables for all code in the sandbox; numbers and
        booleans become text. metadata: labels, to find it again with `list_sandboxes`.
    require_isolation: `kvm` or `emulated`, the weakest tier that will do; a host that has only less starts nothing.
    auto_start_session: False = the session is made by the first call that needs one.
    Raises: AuthenticationError, InvalidInput, HostNotReady (IsolationTooWeak), NetworkError, RateLimitError.
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
        if auto_start_session:
            self.start_session()

    def _build(self, config: Config) -> None:
        super()._build(config)
        self._link = Link(config)
        self.processes = Processes(self._link, self._session)
        """Programs that run in the background."""
        self.egress = Egress(self._link, self._session)
        self.vms = Manager(self._link.send, vms.CALLS)
        self.snapshots = Manager(self._link.send, snapshots.CALLS)

    def after_fork(self) -> None:
        self._starting = threading.Lock()

    def start_session(self) -> str:
        """Make a new session, with this client's sizes and environment, and use it. Returns: its id."""
        return self._bound(self._link.send(sessions.create(self._config.api_key, self._config.session)))

    def execute(self, code: str, language: str = "python", timeout: float | None = None) -> Execution:
        """Run `code` in this session's sandbox and wait until it ends.

        In Python, variables and imports are still there for the next call; shell commands each run in a new
        process.

        code: at most 1 MiB of UTF-8. language: `python`, `bash`, `sh` or `javascript`.
        timeout: seconds, 1 to 600; boot is not counted. None = 300, or what is left of the lifetime. Running
            out is a result too: `timed_out`, exit code 124 and the output so far; the session lives on.
        Returns: stdout and stderr, each cut at 16 MiB; code that failed has an `exit_code` other than 0.
        Raises: InvalidInput; SessionEnded (killed); OutcomeUnknown (the sandbox was lost while the code ran);
            BootFailed, NoCapacity, HostNotReady; NetworkError.
        """
        return self._link.send(executions.execute(self._session(), code, language, timeout))

    def execute_async(self, code: str, language: str = "python", timeout: float | None = None) -> TaskBegun:
        """Let code run in this session without waiting for it; it ends by itself, with its timeout, or with the sandbox.

        timeout: seconds, from 1; None = until the sandbox ends. Raises: as `execute`, but for what the code does.
        """
        return self._link.send(tasks.begin(self._session(), code, language, timeout))

    def get_task_result(self, task_id: str, poll_interval: float = 1.0, timeout: float = 60.0) -> Task:
        """Wait until a task has ended, asking every `poll_interval` seconds.

        Raises: NotFound; TimeoutError after `timeout` seconds: the task runs on.
        """
        deadline = time.monotonic() + timeout
        while not (task := self._link.send(tasks.get(task_id)))["is_complete"]:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"task {task_id} has not ended after {timeout:g} s; it runs on")
            time.sleep(poll_interval)
        return task

    def upload_file(self, file_path: LocalPath, remote_path: files.RemotePath) -> UploadedFile:
        """Put a local file into the sandbox, of any size; it is sent as it is read.

        file_path: a file that grows is sent as long as it was at first; pipes and devices are sent to their end.
        remote_path: relative ones start at /app; directories are made; one that ends in `/`, or is a directory, takes the
            file under its own name. What was there is replaced once all of it has come. `~` is not expanded.
        Raises: FileNotFoundError, IsADirectoryError, PermissionError (the local one); FileError, also for a local file that
            becomes shorter meanwhile; DiskFull; as `execute`.
        """
        local = local_path(file_path, "file_path")
        call, around = files.upload(self._session(), local, remote_path)
        with source(local) as file:
            return self._link.upload(call, around, file)

    def download_file(self, filename: files.RemotePath, local_path: LocalPath | None = None) -> DownloadedFile:
        """Fetch a file from the sandbox, of any size; it is written as it comes.

        filename: relative ones start at /app. local_path: where to write it; None = its `content` is in the result. A file
            there is replaced once all of it has come, and keeps its mode; a folder takes it under its own name; a link is
            followed, a device or a pipe written to.
        Raises: FileMissing, FileError (a directory, a device); OSError of the local place, as `open` does; as `execute`.
        """
        call = files.download(self._session(), filename)
        with landing(files.remote_path(filename, "filename"), local_path) as (file, result):
            result["size"] = self._link.download(call, file)
        return result

    def get_session_app_url(self, session_id: str | None = None, port: int = 80) -> AppUrl:
        """Where a web server on `port` (1 to 65535) of the sandbox is reached.

        Raises: UnsupportedOperationError: the server forwards no connections to sandboxes, as all servers so far.
        """
        return self._link.send(sessions.app_url(session_id or self._session(), port))

    def suspend(self) -> Suspended:
        """Put the sandbox to rest, memory and disk: it takes no memory any more, and goes on later where it is now.

        Code that runs meanwhile stops where it is and goes on with the sandbox. Twice is fine.
        Raises: DiskFull, QuotaExceededError, BootFailed; then it runs as before.
        """
        return self._link.send(vms.suspend(self._vm_id()))

    def resume(self) -> Resumed:
        """Bring the sandbox back: processes, variables, open files; the clock is right. One that is up is fine.

        Raises: CorruptSnapshot (what was saved was altered, or comes from another host); NoCapacity.
        """
        return self._link.send(vms.resume(self._vm_id()))

    def fork(self, count: int = 1, env: Mapping[str, Any] | None = None) -> list[InstaVM]:
        """Copies of this sandbox as it is now, memory and disk, while it goes on; each is a client with a session of its own.

        Every copy has its own clock, entropy and names. count: 1 to 64. env: variables on top, in each copy.
        Close each (or use it in a `with` block). Raises: InvalidInput, QuotaExceededError, NoCapacity, BootFailed.
        """
        if self.session_id is None or not self.is_session_active():
            self.execute("None")
        made = self._link.send(vms.fork(self._vm_id(), count, env))
        return [self._copy(one["session_id"]) for one in made.forks]

    @contextmanager
    def branch(self, count: int) -> Iterator[Branches]:
        """Try several ways from here: `with vm.branch(3) as tries:`. After `tries.keep(one)` this client goes on with that one.

        All others end with the block; without `keep` this sandbox goes on as it was.
        """
        tries = Branches(self.fork(count))
        try:
            yield tries
        except BaseException:
            tries.kept = None
            raise
        finally:
            for one in tries:
                if one is not tries.kept:
                    one.close_session()
                one.close()
        if tries.kept is not None:
            was, self.session_id = self.session_id, tries.kept.session_id
            self._link.send(sessions.kill(str(was)))

    def _vm_id(self) -> str:
        return vm_of(self._link.send(sessions.info(self._session())))

    def stream(self, code: str, language: str = "python", timeout: float | None = None) -> Iterator[StreamEvent]:
        """Run `code` and yield what it prints and shows while it runs; the last event has the `result`.

        A connection that breaks is taken up again where it was: the code is sent once, and runs on meanwhile. Up to 4 MiB
        wait for a reader; what did not fit is missing, and `truncated` is set in the result.
        Arguments and errors are as in `execute`.
        """
        return follow(self._link, Reader(self._session(), code, language, timeout))

    def cancel(self, execution_id: str) -> bool:
        """Stop what `stream` runs, by the `execution_id` of its events. Returns: whether it was still running."""
        return self._link.send(executions.cancel(execution_id))

    def kill(self, session_id: str | None = None) -> None:
        """End the sandbox and its session; nothing of it is left afterwards. Once more is fine."""
        if (target := session_id or self.session_id) is not None:
            self._link.send(sessions.kill(target))
        self._forget(session_id)

    def close_session(self) -> None:
        """The same as `kill()`, for a session that may be gone already."""
        try:
            self.kill()
        except SessionError:
            self._forget(None)

    def close(self) -> None:
        """Close the connection. The sandbox stays until it is killed or its lifetime runs out."""
        self._link.close()

    def get_session_info(self, session_id: str | None = None) -> SessionInfo:
        """The session's record, with how its sandbox came up in `start`."""
        return self._link.send(sessions.info(session_id or self._session()))

    def get_session_status(self, session_id: str | None = None) -> SessionStatus:
        """Whether there is a sandbox now, since when, and for how long still."""
        return self._link.send(sessions.status(session_id or self._session()))

    def is_session_active(self, session_id: str | None = None) -> bool:
        """True when a sandbox is up. Never raises one of our errors."""
        try:
            return self.get_session_status(session_id).vm_status == "active"
        except InstaVMError:
            return False

    def get_isolation(self, vm_id: str | None = None) -> Isolation:
        """What confines a sandbox (this session's, or the one named) now, as its host's kernel tells it, signed by the host.

        Raises: NotFound; as `execute`.
        """
        target = vm_id or self.get_session_info()["vm_id"] or ""
        return self._link.send(isolation.get(target))

    def get_usage(self, session_id: str | None = None) -> SessionUsage:
        """How much was executed, and for how long, over the session's whole life."""
        return self._link.send(sessions.usage(session_id or self._session()))

    def list_sandboxes(
        self, metadata: Mapping[str, Any] | None = None, limit: int = limits.LIST_LIMIT_DEFAULT
    ) -> list[Sandbox]:
        """Live sandboxes of this account, newest first, at most `limit` (1 to 1000).

        metadata: only those whose metadata contains all of these pairs.
        """
        return self._link.send(sessions.sandboxes(metadata, limit))

    def set_session_egress(self, session_id: str | None = None, **policy: Unpack[Policy]) -> EgressPolicy:
        """As `egress.set_session`."""
        return self.egress.set_session(session_id, **policy)

    def get_session_egress(self, session_id: str | None = None) -> EgressPolicy:
        """As `egress.get_session`."""
        return self.egress.get_session(session_id)

    def set_vm_egress(self, vm_id: str, **policy: Unpack[Policy]) -> EgressPolicy:
        """As `egress.set_vm`."""
        return self.egress.set_vm(vm_id, **policy)

    def get_vm_egress(self, vm_id: str) -> EgressPolicy:
        """As `egress.get_vm`."""
        return self.egress.get_vm(vm_id)

    def get_current_user(self) -> User:
        """Whose key this is."""
        return self._link.send(users.me())

    def __enter__(self) -> Self:
        self._own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._is_own:
                self.close_session()
        except InstaVMError as failed:
            if exc is None:
                raise
            exc.add_note(f"its sandbox could not be ended either: {failed}")
        finally:
            self.close()

    def _session(self) -> str:
        with self._starting:
            return self._known_session() or self.start_session()
