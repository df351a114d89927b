"""`vm.processes`: programs that run on in the sandbox, for as long as it lives, whoever comes and goes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from instavm.client.calls import processes as calls
from instavm.client.calls.files import RemotePath
from instavm.client.calls.processes import ProcessEvent
from instavm.client.results import ProcessInfo, ProcessOutput
from instavm.client.streaming import follow, follow_async
from instavm.client.transport import AsyncLink, Link


class Known:
    """What both kinds of `Process` have heard. `info` is from the latest answer."""

    def __init__(self, info: ProcessInfo) -> None:
        self.info = info
        self._next = 0

    @property
    def id(self) -> str:
        return str(self.info["process_id"])

    @property
    def pid(self) -> int | None:
        """Its number in the sandbox."""
        return self.info.pid

    @property
    def result(self) -> ProcessInfo | None:
        """How it ended, as far as an answer has told; None while it runs. `refresh()` asks."""
        return self.info if self.info["status"] == "exited" else None

    def __repr__(self) -> str:
        ended = f"exit_code={self.info['exit_code']}" if self.result else "running"
        return f"<{type(self).__name__} {self.id} {self.info['command'][:60]!r} {ended}>"

    def _heard(self, info: ProcessInfo) -> ProcessInfo:
        self.info = info
        return info

    def _position(self, since: int | None) -> int:
        return self._next if since is None else since

    def _read(self, window: ProcessOutput) -> ProcessOutput:
        self._next = window["next"]
        self.info = ProcessInfo({name: window[name] for name in self.info})
        return window

    @property
    def _at(self) -> tuple[str, str]:
        return str(self.info["session_id"]), self.id


def _late(process: Known, timeout: float) -> TimeoutError:
    return TimeoutError(f"process {process.id} has not ended after {timeout:g} s; it runs on")


def _joined(windows: Sequence[ProcessOutput]) -> ProcessOutput:
    """Windows that follow each other, as one."""
    parts = {name: "".join(one[name] for one in windows) for name in ("stdout", "stderr", "text")}
    return ProcessOutput({**windows[-1], **parts, "lost": sum(one["lost"] for one in windows)})


class Process(Known):
    """A process of the sandbox. Any number of these may stand for the same one."""

    def __init__(self, link: Link, info: ProcessInfo) -> None:
        super().__init__(info)
        self._link = link

    def refresh(self) -> ProcessInfo:
        """How it is now. Raises, as all that follow: ProcessNotFound (also when its sandbox is gone), NetworkError."""
        return self._heard(self._link.send(calls.wait(*self._at, 0.0)))

    def read(self, since: int | None = None) -> ProcessOutput:
        """What it wrote since position `since`; None = since the last `read` of this object. Does not wait.

        The latest MiB of a process's output is kept in the sandbox; `lost` says how many bytes are missing before.
        """
        return self._read(self._link.send(calls.read(*self._at, self._position(since))))

    def output(self) -> ProcessOutput:
        """All that is kept of its output."""
        windows = [self._link.send(calls.read(*self._at, 0))]
        while windows[-1]["text"] and windows[-1]["next"] < windows[0]["written"]:
            windows.append(self._link.send(calls.read(*self._at, windows[-1]["next"])))
        return self._read(_joined(windows))

    def follow(self, since: int = 0) -> Iterator[ProcessEvent]:
        """What it writes, from position `since` on, as it comes; the last event is its end.

        A connection that breaks, to whatever server, is taken up again where it was.
        """
        for event in follow(self._link, calls.Follower(*self._at, since)):
            if event["type"] == "exit":
                self._heard(event["process"])
            yield event

    def write(self, data: str | bytes, close: bool = False) -> None:
        """Give its stdin `data`, at most 1 MiB, all or nothing; with `close`, its end behind it.

        Raises: ProcessEnded; ProcessError (stdin is closed, or 1 MiB waits for it already); InvalidInput.
        """
        self._heard(self._link.send(calls.write(*self._at, data, close)))

    def signal(self, name: str | int) -> None:
        """Send a signal (`"TERM"`, `"SIGTERM"`, 15) to its process group. Raises: ProcessEnded, InvalidInput."""
        self._heard(self._link.send(calls.signal(*self._at, name)))

    def kill(self) -> None:
        """End it and everything that it has started. Fine if it has ended."""
        self.signal("KILL")

    def wait(self, timeout: float | None = None) -> ProcessInfo:
        """Wait for its end. Raises: TimeoutError after `timeout` seconds: it runs on."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            info = self._heard(self._link.send(calls.wait(*self._at, left)))
            if info["status"] == "exited":
                return info
            if deadline is not None and timeout is not None and time.monotonic() >= deadline:
                raise _late(self, timeout)


class Processes:
    """The processes of one client's session."""

    def __init__(self, link: Link, session: Callable[[], str]) -> None:
        self._link = link
        self._session = session

    def start(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, Any] | None = None,
        cwd: RemotePath | None = None,
        shell: str = "bash",
    ) -> Process:
        """Start a process in the background; it ends by itself, when it is killed, or with the sandbox.

        command: a line for `shell` (bash or sh), or a program with its arguments, without a shell. cwd: else /app; it must be
            there, or the process ends with exit code 126. env: besides the session's.
        Raises: InvalidInput; RateLimitError (64 run); as `InstaVM.execute`.
        """
        return Process(self._link, self._link.send(calls.start(self._session(), command, shell, cwd, env)))

    def list(self) -> list[ProcessInfo]:
        """Those that run, and the latest 32 that have ended."""
        return self._link.send(calls.listing(self._session()))

    def get(self, process_id: str) -> Process:
        """Take up a process by its id, started by whatever client. Raises: ProcessNotFound."""
        return Process(self._link, self._link.send(calls.wait(self._session(), process_id, 0.0)))


class AsyncProcess(Known):
    """As `Process`."""

    def __init__(self, link: AsyncLink, info: ProcessInfo) -> None:
        super().__init__(info)
        self._link = link

    async def refresh(self) -> ProcessInfo:
        """As `Process.refresh`."""
        return self._heard(await self._link.send(calls.wait(*self._at, 0.0)))

    async def read(self, since: int | None = None) -> ProcessOutput:
        """As `Process.read`."""
        return self._read(await self._link.send(calls.read(*self._at, self._position(since))))

    async def output(self) -> ProcessOutput:
        """As `Process.output`."""
        windows = [await self._link.send(calls.read(*self._at, 0))]
        while windows[-1]["text"] and windows[-1]["next"] < windows[0]["written"]:
            windows.append(await self._link.send(calls.read(*self._at, windows[-1]["next"])))
        return self._read(_joined(windows))

    async def follow(self, since: int = 0) -> AsyncIterator[ProcessEvent]:
        """As `Process.follow`."""
        async for event in follow_async(self._link, calls.Follower(*self._at, since)):
            if event["type"] == "exit":
                self._heard(event["process"])
            yield event

    async def write(self, data: str | bytes, close: bool = False) -> None:
        """As `Process.write`."""
        self._heard(await self._link.send(calls.write(*self._at, data, close)))

    async def signal(self, name: str | int) -> None:
        """As `Process.signal`."""
        self._heard(await self._link.send(calls.signal(*self._at, name)))

    async def kill(self) -> None:
        """As `Process.kill`."""
        await self.signal("KILL")

    async def wait(self, timeout: float | None = None) -> ProcessInfo:
        """As `Process.wait`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            info = self._heard(await self._link.send(calls.wait(*self._at, left)))
            if info["status"] == "exited":
                return info
            if deadline is not None and timeout is not None and time.monotonic() >= deadline:
                raise _late(self, timeout)


class AsyncProcesses:
    """As `Processes`."""

    def __init__(self, link: AsyncLink, session: Callable[[], Awaitable[str]]) -> None:
        self._link = link
        self._session = session

    async def start(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, Any] | None = None,
        cwd: RemotePath | None = None,
        shell: str = "bash",
    ) -> AsyncProcess:
        """As `Processes.start`."""
        call = calls.start(await self._session(), command, shell, cwd, env)
        return AsyncProcess(self._link, await self._link.send(call))

    async def list(self) -> list[ProcessInfo]:
        """As `Processes.list`."""
        return await self._link.send(calls.listing(await self._session()))

    async def get(self, process_id: str) -> AsyncProcess:
        """As `Processes.get`."""
        return AsyncProcess(self._link, await self._link.send(calls.wait(await self._session(), process_id, 0.0)))
