"""A VMM process that we own: started without a thread or a signal handler, waited for through a pidfd.

One that an earlier server started is adopted by its number; whoever passes that number has made sure what runs under it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import anyio

UNKNOWN_STATUS = -255
"""The exit status of an adopted process: only its parent could have learnt it."""


class VMMProcess:
    """Started in a session of its own, so that a Ctrl-C at the server's terminal does not reach it."""

    def __init__(self, pid: int, log: Path, popen: subprocess.Popen[bytes] | None = None) -> None:
        """Raises ProcessLookupError when it is gone already."""
        self.pid = pid
        self._popen = popen
        self._pidfd = os.pidfd_open(pid)
        self._log = log
        self._gone = False

    @classmethod
    def spawn(cls, argv: Sequence[str], *, log: Path, pass_fds: Sequence[int]) -> Self:
        """Raises OSError when the program can't be started."""
        with log.open("wb") as output:
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
                cwd="/",
                env={"LANG": "C.UTF-8", "PATH": os.defpath},
            )
        return cls(popen.pid, log, popen)

    def in_background(self, background: bool) -> None:
        """Whether it runs only when nothing else wants the CPU (SCHED_IDLE), or like everybody."""
        policy = os.SCHED_IDLE if background else os.SCHED_OTHER
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))
            except ProcessLookupError:
                continue  # a thread that ended meanwhile

    @property
    def alive(self) -> bool:
        if self._popen is not None:
            return self._popen.poll() is None
        if not self._gone:
            try:
                signal.pidfd_send_signal(self._pidfd, 0)
            except ProcessLookupError:
                self._gone = True
        return not self._gone

    async def wait(self) -> int:
        """Exit status, negative for a signal. Any number of waiters."""
        while self.alive:
            pidfd = os.dup(self._pidfd)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
            if self._popen is None:
                self._gone = True
        return UNKNOWN_STATUS if self._popen is None else self._popen.returncode

    async def kill(self) -> None:
        """SIGKILL and reap; a VMM has nothing to say good-bye for. Twice is fine."""
        with anyio.CancelScope(shield=True):
            if self.alive:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            await self.wait()
            self.let_go()

    def let_go(self) -> None:
        """Forget the process without ending it. Twice is fine."""
        if self._pidfd >= 0:
            self._gone = True
            os.close(self._pidfd)
            self._pidfd = -1
        if self._popen is not None and self._popen.returncode is None:
            self._popen.returncode = UNKNOWN_STATUS  # it is somebody else's to reap from here on

    def last_words(self, limit: int = 2000) -> str:
        try:
            return self._log.read_text(errors="replace")[-limit:].strip()
        except OSError:
            return ""
