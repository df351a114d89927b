"""Programs that run beside the interpreter: each a process of its own, in a control group of its own."""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
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
LITTLE = 4 << 10
"""Read at once of a pipe, until that was too little: a longer buffer takes an emulated guest longer."""
DRAIN_READS = 32
PASSED_ON = "bytes, and nothing else"
"""What a handler of the agent's loop returns when it can't have changed a deadline."""
EXIT_MISSING = 127
"""No such program in this image."""
EXIT_NOT_STARTED = 126
"""It could not be started, as where its working folder is gone."""


class Output:
    """The reading end of a program's stdout or stderr.

    What comes goes to `sink` if there is one, else to the host for `request` while there is one.
    """

    def __init__(self, agent: Agent, kind: int, pair: select.poll, sink: Callable[[int, bytes], None] | None) -> None:
        self._agent = agent
        self._kind = kind
        self._pair = pair
        self._ahead = LITTLE
        self.request: int | None = None
        self.sink = sink
        self._read, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read, False)
        try:
            fcntl.fcntl(self._read, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            pass  # the default of 64 KiB does too, only slower
        pair.register(self._read, select.POLLIN)
        agent.watch(self._read, self.ready)

    def fileno(self) -> int:
        return self._read

    def started(self) -> None:
        """The program has its end now; ours must go, or the pipe would never end."""
        os.close(self.write_end)
        self.write_end = -1

    def ready(self, _fd: int) -> object:
        try:
            data = os.read(self._read, self._ahead)
        except BlockingIOError:
            return PASSED_ON
        except OSError:
            data = b""
        if not data:
            self._close()
            return PASSED_ON
        self._ahead = frames.CHUNK if len(data) == self._ahead else LITTLE
        if self.request is not None:
            self._agent.send(self._kind, self.request, data)
        elif self.sink is not None:
            self.sink(self._kind, data)
        return PASSED_ON

    def _close(self) -> None:
        self._pair.unregister(self._read)
        self._agent.unwatch(self._read)
        os.close(self._read)
        self._read = -1


class Outputs:
    """A program's stdout and stderr."""

    def __init__(self, agent: Agent, sink: Callable[[int, bytes], None] | None = None) -> None:
        self._poll = select.poll()
        self._both = tuple(Output(agent, kind, self._poll, sink) for kind in (frames.STDOUT, frames.STDERR))

    def write_ends(self) -> list[int]:
        return [output.write_end for output in self._both]

    def started(self) -> None:
        for output in self._both:
            output.started()

    def belong_to(self, request: int) -> None:
        for output in self._both:
            output.request = request

    def end(self, keep: bool = False) -> None:
        """Pass on what was written until now. What still writes may go on: if `keep`, for the sink, else for nobody."""
        self.drain()
        for output in self._both:
            output.request = None
            if not keep:
                output.sink = None

    def drain(self) -> None:
        """Pass on what is in the pipes by now; bounded, since another process may go on writing."""
        out, err = self._both
        for _ in range(DRAIN_READS):
            waiting = self._poll.poll(0)
            if not waiting:
                return
            for fd, _ in waiting:
                (out if fd == out.fileno() else err).ready(fd)


class Run:
    """One program that answers one request."""

    def __init__(self, agent: Agent, request: int, timeout_s: float) -> None:
        self._agent = agent
        self.request = request
        self.began = time.monotonic()
        self.deadline: float | None = self.began + timeout_s
        self.reason: str | None = None
        self.cgroup = Cgroup(f"run-{request}")
        self.outputs = Outputs(agent)
        self.outputs.belong_to(request)

    def started(self, _pid: int) -> None:
        if self.reason is not None:  # its end was asked for when there was nothing in its group yet
            self.cgroup.kill()

    def end(self, reason: str) -> None:
        self.deadline = None
        self.reason = reason
        self.cgroup.kill()

    def exited(self, report: Message) -> None:
        self.outputs.end()
        reason = self.reason
        if reason is None and report["exit"] != 0:
            reason = self.cgroup.refused() or ("disk_full" if disk_is_full(USER_ROOT) else None)
        wall, cpu = time.monotonic() - self.began, max(report["cpu"], self.cgroup.cpu_s())
        self._agent.send(
            frames.RAN, self.request, frames.end_payload(report["exit"], wall, cpu, report["rss_kib"], reason)
        )


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
    ) -> int:
        """Start the first of `programs` that the image has; the number by which it can be signalled.

        cwd: where it cannot begin in there it does not start: exit code 126, and a line on its stderr. on_start: is told its
        pid, before `on_exit` is told of its end. Raises: OSError, also for an environment that is too long.
        """
        number = self._number + 1
        ask = json.dumps({"id": number, "programs": programs, "env": env, "cwd": cwd}).encode()
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
        fds = [null, *run.outputs.write_ends(), *script]
        self._runs[request] = run
        try:
            ended = partial(self._ended, run)
            self.spawn(programs, env, cwd, run.cgroup, fds, ended, on_start=run.started)
        finally:
            for fd in (null, *script):
                os.close(fd)
            run.outputs.started()

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
