"""A VMM process that we own: started in its jail without a thread or a signal handler, waited for through a pidfd.

One that an earlier server started is adopted by its number; whoever passes that number has made sure what runs under it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self

import anyio

from instavm.errors import BootFailed, HostNotReady
from instavm.node.jail.jail import Cage, Jailed, Jails

UNKNOWN_STATUS = -255
"""The exit status of an adopted process: only its parent could have learnt it."""
WORDS_BYTES = 1 << 16


class Words:
    """What a VMM writes on stdout and stderr: a FIFO, from which nothing ever gets to a disk.

    It holds 64 KiB that nobody has read; what comes on top is lost, and its writer neither waits nor is ended for it.
    It is opened for reading and writing by both sides, so that it lives as long as one of them, and a next server can go on.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._heard = b""

    def last(self, limit: int = 2000) -> str:
        if self.fd >= 0:
            with contextlib.suppress(BlockingIOError):
                # at most what the FIFO held: one who goes on writing is not listened to for ever
                self._heard = (self._heard + os.read(self.fd, WORDS_BYTES))[-WORDS_BYTES:]
        return self._heard.decode(errors="replace")[-limit:].strip()

    def close(self) -> None:
        """Twice is fine."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class VMMProcess:
    """Started in a session of its own, so that a Ctrl-C at the server's terminal does not reach it."""

    def __init__(self, pid: int, cage: Cage, words: Words, parent: subprocess.Popen[bytes] | None = None) -> None:
        """parent: the process that we started, which ends with this one or is the same. Raises ProcessLookupError."""
        self.pid = pid
        self.cage = cage
        self._pidfd = os.pidfd_open(pid)
        self._parent = parent
        self._words = words
        self._gone = False
        self._background: bool | None = None

    @classmethod
    async def spawn(cls, start: Callable[[int], Awaitable[Jailed]], *, log: Path) -> Self:
        """start: starts it, with its output to the descriptor it is called with.

        Raises HostNotReady, when it can't be jailed or started; OSError.
        """
        words = Words(log)
        try:
            jailed = await start(words.fd)
            return cls(jailed.pid, jailed.cage, words, jailed.parent)
        except BaseException as exc:
            said = words.last()
            words.close()
            if isinstance(exc, (HostNotReady, BootFailed)):
                raise type(exc)(f"{exc} {said}".strip()) from exc
            raise

    @classmethod
    def adopt(cls, pid: int, jails: Jails, home: Path, *, log: Path) -> Self:
        """Raises ProcessLookupError, FileNotFoundError: it is gone already."""
        return cls(pid, jails.adopt(pid, home), Words(log))

    def in_background(self, background: bool) -> None:
        """Whether it runs only when nothing else wants the CPU (SCHED_IDLE), or like everybody."""
        if background == self._background:
            return
        self._background = background
        self.cage.idle(background)
        policy = os.SCHED_IDLE if background else os.SCHED_OTHER
        with contextlib.suppress(FileNotFoundError):  # it is gone: whoever talks to it next learns that
            for thread in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))

    @property
    def alive(self) -> bool:
        if not self._gone:
            ended = select.poll()  # and not a signal of 0, which a process that nobody has reaped yet still takes
            ended.register(self._pidfd, select.POLLIN)
            self._gone = bool(ended.poll(0))
        return not self._gone and (self._parent is None or self._parent.poll() is None)

    async def wait(self) -> int:
        """Exit status, negative for a signal. Any number of waiters."""
        while not self._gone:
            pidfd = os.dup(self._pidfd)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
            self._gone = True
        if self._parent is None:
            return UNKNOWN_STATUS
        status = await self._reaped(self._parent)
        return status if self._parent.pid == self.pid or status <= 128 else 128 - status

    async def _reaped(self, parent: subprocess.Popen[bytes]) -> int:
        while (status := parent.poll()) is None:
            pidfd = os.pidfd_open(parent.pid)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return status

    def stop(self) -> None:
        """SIGKILL, without waiting; `kill` does the rest."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def kill(self) -> None:
        """SIGKILL and reap, and remove its cage; a VMM has nothing to say good-bye for. Twice is fine."""
        with anyio.CancelScope(shield=True):
            if self._pidfd < 0:
                return
            self.stop()
            await self.wait()
            await anyio.to_thread.run_sync(self.cage.remove)
            self._words.last()
            self.let_go()

    def let_go(self) -> None:
        """Forget the process without ending it. Twice is fine."""
        self._gone = True
        self._words.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        if self._parent is not None and self._parent.returncode is None:
            self._parent.returncode = UNKNOWN_STATUS  # it is somebody else's to reap from here on

    def last_words(self, limit: int = 2000) -> str:
        return self._words.last(limit)


class OneProcess:
    """What a machine is, by way of the one process that it runs in. The base of every driver's machine."""

    def __init__(self, process: VMMProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.alive

    @property
    def over_memory(self) -> bool:
        return self._process.cage.over_memory

    async def wait(self) -> int:
        return await self._process.wait()
