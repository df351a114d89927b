"""The agent's side of the interpreter: one worker process, a queue of cells, and a new worker when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from instavm_guest import frames
from instavm_guest.frames import Message
from instavm_guest.programs import EXIT_CANCELLED, EXIT_TIMEOUT, Output, Programs
from instavm_guest.worker import ANSWER, ASK, FRESH, LINE_FD, REHEARSE
from instavm_guest.world import Cgroup

if TYPE_CHECKING:
    from instavm_guest.agent import Agent

INTERRUPT_GRACE_S = 1.0
"""How long a cell may take to yield to an interrupt before its interpreter is killed."""
_SOURCE = Path(__file__).with_name("worker.py")
_BOOTSTRAP = (
    "import os\n"
    "with open({fd}) as f: s = f.read()\n"
    "exec(compile(s, '<instavm>', 'exec'), {{'__name__': '__main__', '__file__': '<instavm>', "
    "'__builtins__': __builtins__}})"
)


class Cell(NamedTuple):
    request: int
    code: str
    env: dict[str, str]
    timeout_s: float


class Interpreter:
    def __init__(self, agent: Agent, programs: Programs) -> None:
        self._agent = agent
        self._programs = programs
        self._cgroup = Cgroup("python")
        self._queue: deque[Cell] = deque()
        self._current: Cell | None = None
        self._deadline: float | None = None
        self._began = 0.0
        self._reason: str | None = None
        self._line: socket.socket | None = None
        self._inbox = bytearray()
        self._number = 0
        self._outputs: tuple[Output, Output] | None = None
        self._env: dict[str, str] = {}
        self._cwd = "/app"
        self._fresh = 0
        self._new_env: dict[str, str] = {}

    def start(self, env: dict[str, str], cwd: str) -> None:
        self._env, self._cwd = env, cwd
        self._start_worker()

    def rehearse(self) -> None:
        """Keep the worker going through the motions of a cell until it has one."""
        if self._line is not None and self._current is None:
            self._line.sendall(ASK.pack(REHEARSE, 0, 0))

    def identify(self, env: dict[str, str]) -> None:
        """This is another sandbox now. The worker hears it with its next cell, ahead of the cell's code."""
        self._fresh = FRESH
        self._new_env = dict(env)

    def execute(self, request: int, code: str, env: dict[str, str], timeout_s: float) -> None:
        self._queue.append(Cell(request, code, env, timeout_s))
        self._next()

    def cancel(self, request: int) -> None:
        if self._current is not None and self._current.request == request:
            self._interrupt("cancelled")
        for cell in [cell for cell in self._queue if cell.request == request]:
            self._queue.remove(cell)
            self._answer(cell, EXIT_CANCELLED, 0.0, 0.0, "cancelled")

    def next_deadline(self) -> float | None:
        return self._deadline

    def expire(self, now: float) -> None:
        if self._deadline is None or self._deadline > now:
            return
        if self._reason is None:
            self._interrupt("timeout")
        else:  # it was interrupted and did not yield
            self._deadline = None
            self._programs.signal(self._number, signal.SIGKILL)

    def _interrupt(self, reason: str) -> None:
        self._reason = reason
        self._deadline = time.monotonic() + INTERRUPT_GRACE_S
        self._programs.signal(self._number, signal.SIGINT)

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        source = os.open(_SOURCE, os.O_RDONLY | os.O_CLOEXEC)
        outputs = (Output(self._agent, frames.STDOUT), Output(self._agent, frames.STDERR))
        bootstrap = _BOOTSTRAP.format(fd=LINE_FD + 1)
        argv = [("python3", "-c", bootstrap), ("python", "-c", bootstrap)]
        fds = [null, outputs[0].write_end, outputs[1].write_end, theirs.fileno(), source]
        self._line, self._inbox, self._outputs = ours, bytearray(), outputs
        self._number = self._programs.spawn(argv, self._env, self._cwd, self._cgroup, fds, self._died)
        for fd in (null, source):
            os.close(fd)
        theirs.close()
        for output in outputs:
            output.started()
        self._agent.watch(ours.fileno(), self._heard)

    def _next(self) -> None:
        if self._current is not None or not self._queue:
            return
        if self._line is None:
            self._start_worker()
        assert self._line is not None and self._outputs is not None
        cell = self._current = self._queue.popleft()
        self._reason = None
        self._began = time.monotonic()
        self._deadline = self._began + cell.timeout_s
        for output in self._outputs:
            output.request = cell.request
        env = {**self._new_env, **cell.env}
        extra = json.dumps(env).encode() if env else b""
        code = cell.code.encode("utf-8", "surrogatepass")
        ask = ASK.pack(self._fresh, len(code), len(extra)) + code + extra
        self._fresh, self._new_env = 0, {}
        try:
            self._line.sendall(ask)
        except OSError:
            pass  # it died just now: _died answers for the cell

    def _heard(self, _fd: int) -> None:
        assert self._line is not None
        try:
            data = self._line.recv(65536)
        except OSError:
            data = b""
        if not data:
            self._agent.unwatch(self._line.fileno())  # its exit is reported by the spawner
            return
        self._inbox += data
        if len(self._inbox) >= ANSWER.size:
            exit_code, wall, cpu = ANSWER.unpack_from(self._inbox)
            del self._inbox[: ANSWER.size]
            self._finish(exit_code, wall, cpu, self._reason)

    def _died(self, report: Message) -> None:
        """The worker process ended: crashed, killed, or told to by os._exit()."""
        assert self._line is not None
        self._agent.unwatch(self._line.fileno())
        self._line.close()
        self._line = None
        exit_code = report["exit"] if report["exit"] >= 0 else 128 - report["exit"]
        if self._current is not None:
            wall = time.monotonic() - self._began
            reason = self._reason or ("interpreter_missing" if exit_code == 127 else "interpreter_crashed")
            self._finish(exit_code, wall, report["cpu"], reason)

    def _finish(self, exit_code: int, wall: float, cpu: float, reason: str | None) -> None:
        cell, self._current, self._deadline = self._current, None, None
        assert cell is not None and self._outputs is not None
        for output in self._outputs:
            output.drain()
            output.request = None
        if reason == "timeout":
            exit_code = EXIT_TIMEOUT
        elif reason == "cancelled":
            exit_code = EXIT_CANCELLED
        self._answer(cell, exit_code, wall, cpu, reason)
        self._next()

    def _answer(self, cell: Cell, exit_code: int, wall: float, cpu: float, reason: str | None) -> None:
        self._agent.answer(cell.request, {"exit_code": exit_code, "wall": wall, "cpu": cpu, "reason": reason})
