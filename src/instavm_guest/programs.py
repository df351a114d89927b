"""Programs that run beside the interpreter: each a process of its own, in a control group of its own."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import termios
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from instavm_guest import frames
from instavm_guest.frames import Message
from instavm_guest.world import USER_ROOT, Cgroup, disk_is_full

if TYPE_CHECKING:
    from instavm_guest.agent import Agent

ARGUMENT_MAX = 100 << 10
"""Longest script that goes as an argument; the kernel's own limit is 128 KiB (MAX_ARG_STRLEN)."""
PIPE_BYTES = 1 << 20
DRAIN_READS = 32
_NONE = bytes(4)
"""FIONREAD's answer for a pipe that is empty."""
EXIT_TIMEOUT = 124
EXIT_CANCELLED = 130
EXIT_MISSING = 127
"""No such program in this image."""


class Output:
    """The reading end of a program's stdout or stderr.

    What comes goes to `sink` if there is one, else to the host for `request` while there is one.
    """

    def __init__(self, agent: Agent, kind: int, sink: Callable[[int, bytes], None] | None = None) -> None:
        self._agent = agent
        self._kind = kind
        self.request: int | None = None
        self.sink = sink
        self._read, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        try:
            fcntl.fcntl(self._read, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the default of 64 KiB does too, only slower
        agent.watch(self._read, self._ready)

    def started(self) -> None:
        """The program has its end now; ours must go, or the pipe would never end."""
        os.close(self.write_end)
        self.write_end = -1

    def drain(self) -> None:
        """Pass on what is in the pipe by now; bounded, since another process may go on writing."""
        for _ in range(DRAIN_READS):
            if self._read < 0 or fcntl.ioctl(self._read, termios.FIONREAD, _NONE) == _NONE:
                return
            self._ready(self._read)

    def _ready(self, _fd: int) -> bool:
        try:
            data = os.read(self._read, frames.CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            return False
        if self.request is not None:
            self._agent.send(self._kind, self.request, data)
        elif self.sink is not None:
            self.sink(self._kind, data)
        return True

    def close(self) -> None:
        if self._read >= 0:
            self._agent.unwatch(self._read)
            os.close(self._read)
            self._read = -1


def result(
    exit_code: int,
    wall: float,
    cpu: float,
    peak_kib: int,
    reason: str | None,
    cut: bool = False,
    restarted: bool = False,
) -> Message:
    """What became of a request, as DONE tells it. A negative `exit_code` is the signal that ended it."""
    told: Message = {"wall_us": int(wall * 1e6), "cpu_us": int(cpu * 1e6), "peak_kib": peak_kib, "reason": reason}
    if exit_code < 0:
        told["signal"] = -exit_code
    if cut:
        told["cut"] = True
    if restarted:
        told["restarted"] = True
    if reason in ("timeout", "cancelled"):
        told["exit_code"] = EXIT_TIMEOUT if reason == "timeout" else EXIT_CANCELLED
    else:
        told["exit_code"] = exit_code if exit_code >= 0 else 128 - exit_code
    return told


class Run:
    """One program that answers one request."""

    def __init__(self, agent: Agent, request: int, timeout_s: float) -> None:
        self._agent = agent
        self.request = request
        self.began = time.monotonic()
        self.deadline: float | None = self.began + timeout_s
        self.reason: str | None = None
        self.cgroup = Cgroup(f"run-{request}")
        self.outputs = (Output(agent, frames.STDOUT), Output(agent, frames.STDERR))
        for output in self.outputs:
            output.request = request

    def started(self, _pid: int) -> None:
        if self.reason is not None:  # its end was asked for when there was nothing in its group yet
            self.cgroup.kill()

    def end(self, reason: str) -> None:
        self.deadline = None
        self.reason = reason
        self.cgroup.kill()

    def exited(self, report: Message) -> None:
        for output in self.outputs:
            output.drain()
            output.request = None  # a background process may go on writing; nobody asks for that any more
        reason = self.reason
        if reason is None and report["exit"] != 0:
            reason = self.cgroup.refused() or ("disk_full" if disk_is_full(USER_ROOT) else None)
        wall, cpu = time.monotonic() - self.began, max(report["cpu"], self.cgroup.cpu_s())
        self._agent.answer(self.request, result(report["exit"], wall, cpu, report["rss_kib"], reason))


class Programs:
    """Starts programs through the spawner and hears from it when they end."""

    def __init__(self, agent: Agent, line: socket.socket) -> None:
        self._agent = agent
        self._line = line
        self._number = 0
        self._on_exit: dict[int, Callable[[Message], None]] = {}
        self._on_start: dict[int, Callable[[int], None]] = {}
        self._pids: dict[int, int] = {}
        self._runs: dict[int, Run] = {}
        self._lingering: list[Cgroup] = []
        agent.watch(line.fileno(), self._heard)

    def spawn(
        self,
        programs: Sequence[tuple[str, ...]],
        env: dict[str, str],
        cwd: str,
        cgroup: Cgroup,
        fds: list[int],
        on_exit: Callable[[Message], None],
        *,
        on_start: Callable[[int], None] | None = None,
        cwd_must: bool = False,
    ) -> int:
        """Start the first of `programs` that the image has; the number by which it can be signalled.

        on_start: is told its pid, before `on_exit` is told of its end. cwd_must: without `cwd` it does not start, else it
        starts in `/`. Raises: OSError, also for an environment that is too long.
        """
        number = self._number + 1
        ask = json.dumps({"id": number, "programs": programs, "env": env, "cwd": cwd, "must": cwd_must}).encode()
        procs = cgroup.open_procs()
        try:
            socket.send_fds(self._line, [ask], [procs, *fds])
        finally:
            os.close(procs)
        self._number = number
        self._on_exit[number] = on_exit
        if on_start is not None:
            self._on_start[number] = on_start
        return number

    def pid(self, number: int) -> int | None:
        """A program's number in the user's world, while it runs and as soon as the spawner has told it."""
        return self._pids.get(number)

    def signal(self, number: int, signum: int, *, group: bool = False) -> None:
        """`group`: to its whole process group."""
        self._line.send(json.dumps({"id": number, "signal": signum, "group": group}).encode())

    def release(self, cgroup: Cgroup) -> None:
        """Remove it, as soon as nothing runs in it any more."""
        self._lingering = [group for group in (*self._lingering, cgroup) if not group.remove()]

    def run(
        self, request: int, programs: Sequence[tuple[str, ...]], env: dict[str, str], cwd: str, timeout_s: float
    ) -> None:
        script: list[int] = []
        if len(programs[0][-1]) > ARGUMENT_MAX:
            script = [memory_file(programs[0][-1].encode())]
            programs = [(program[0], "/dev/fd/3") for program in programs]
        run = Run(self._agent, request, timeout_s)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        fds = [null, *(output.write_end for output in run.outputs), *script]
        self._runs[request] = run
        try:
            ended = partial(self._ended, run)
            self.spawn(programs, env, cwd, run.cgroup, fds, ended, on_start=run.started)
        finally:
            for fd in (null, *script):
                os.close(fd)
            for output in run.outputs:
                output.started()

    def cancel(self, request: int) -> None:
        if request in self._runs:
            self._runs[request].end("cancelled")

    def next_deadline(self) -> float | None:
        return min((run.deadline for run in self._runs.values() if run.deadline is not None), default=None)

    def expire(self, now: float) -> None:
        for run in list(self._runs.values()):
            if run.deadline is not None and run.deadline <= now:
                run.end("timeout")

    def _ended(self, run: Run, report: Message) -> None:
        del self._runs[run.request]
        run.exited(report)
        self.release(run.cgroup)

    def _heard(self, _fd: int) -> None:
        data = self._line.recv(65536)
        if not data:
            raise SystemExit("the user's world has ended")  # our own pid 1 starts us, and it, again
        report = json.loads(data)
        if "pid" in report:
            self._pids[report["id"]] = report["pid"]
            if self._on_start and (tell := self._on_start.pop(report["id"], None)) is not None:
                tell(report["pid"])
        elif "exit" in report:
            self._pids.pop(report["id"], None)
            self._on_exit.pop(report["id"])(report)


def memory_file(data: bytes) -> int:
    """A descriptor from which `data` can be read."""
    fd = os.memfd_create("instavm", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
