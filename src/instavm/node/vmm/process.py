"""A VMM process that we own: started without a thread or a signal handler, waited for through a pidfd."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import anyio


class VMMProcess:
    """Started in a session of its own, so that a Ctrl-C at the server's terminal does not reach it."""

    def __init__(self, argv: Sequence[str], *, log: Path, pass_fds: Sequence[int]) -> None:
        """Raises OSError when the program can't be started."""
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
                cwd="/",
                env={"LANG": "C.UTF-8", "PATH": os.defpath},
            )
        self.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._log = log

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
        return self._popen.poll() is None

    async def wait(self) -> int:
        """Exit status, negative for a signal. Any number of waiters."""
        while (status := self._popen.poll()) is None:
            pidfd = os.dup(self._pidfd)
            try:
                await anyio.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return status

    async def kill(self) -> None:
        """SIGKILL and reap; a VMM has nothing to say good-bye for. Twice is fine."""
        with anyio.CancelScope(shield=True):
            if self.alive:
                self._popen.send_signal(signal.SIGKILL)
            await self.wait()
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1

    def last_words(self, limit: int = 2000) -> str:
        try:
            return self._log.read_text(errors="replace")[-limit:].strip()
        except OSError:
            return ""
