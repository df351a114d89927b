"""The agent's side of an interpreter: one worker process, a queue of cells, and a new worker when one is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from instavm_guest import environment, frames
from instavm_guest.frames import Message
from instavm_guest.processes import Log
from instavm_guest.programs import EXIT_MISSING, EXIT_NOT_STARTED, Outputs, Programs, memory_file
from instavm_guest.worker import (
    ANSWER,
    ANSWERED,
    ASK,
    AWAIT,
    ENOUGH,
    FRESH,
    OUTPUT,
    PACKAGE,
    PARTS,
    REHEARSE,
    SOURCE_FD,
)
from instavm_guest.world import USER_ROOT, Cgroup, disk_is_full, ticks

if TYPE_CHECKING:
    from instavm_guest.agent import Agent

INTERRUPT_GRACE_S = 1.0
"""How long a cell may take to yield to an interrupt before its interpreter is killed."""
PULSE_S = 0.02
"""How often the worker is told, while a cell runs, to write out what was printed without a newline."""
FIRST_PULSE_S = 0.1
"""The same for the first cell of a clone: right after a restore nothing is done that the cell itself does not need."""
LITTLE = 4 << 10
"""Read at once of what the worker says, but for rich outputs: a longer buffer takes an emulated guest longer."""
SECONDS_MAX, KIB_MAX, EXITS = 10**9, 1 << 40, range(256)
"""What a worker may tell of a cell: the host takes no more."""
COUNT_CPU_AFTER_S = 0.2
"""From when on the CPU time of a cell is known even if its worker dies."""
LIMIT = struct.Struct("!I")
LATE_BYTES = 256 << 10
"""Kept of what is printed between two cells: the latest so many bytes."""


class Kind(NamedTuple):
    """A language whose state persists.

    source: what its worker reads from SOURCE_FD. too_late: of the environment that a worker was started with and variables that
    came since, the names that it does not heed any more. limit: how its worker is told, ahead of the code, how many milliseconds
    a cell may take. keeps_late: whether what is printed between two cells goes to the second.
    """

    name: str
    programs: tuple[tuple[str, ...], ...]
    source: bytes
    too_late: Callable[[Mapping[str, str], Mapping[str, str]], list[str]] = lambda begun, new: []
    limit: struct.Struct | None = None
    keeps_late: bool = False


def python() -> Kind:
    here = Path(__file__).parent
    sources = {f"{PACKAGE}.{name}": (here / f"{name}.py").read_text() for name in PARTS}
    main = f"{PACKAGE}.worker"
    bootstrap = (
        "import json\n"
        f"with open({SOURCE_FD}) as f: s = json.load(f)\n"
        f"exec(compile(s[{main!r}], '<instavm>', 'exec'), {{'__name__': '__main__', '__file__': '<instavm>', "
        "'__builtins__': dict(__builtins__.__dict__), 'SOURCES': s})"
    )
    source = json.dumps({PACKAGE: "", **sources}).encode()
    programs = tuple(
        (name, "-u", "-c", bootstrap) for name in ("python3", "python")
    )  # -u: what C code prints is not held back
    return Kind("python", programs, source, too_late=environment.needs_a_new_one, keeps_late=True)


def javascript() -> Kind:
    here = Path(__file__).parent
    names = ("worker", "outlets", "pending", "source")
    source = json.dumps({name: (here / f"{name}.js").read_text() for name in names}).encode()
    bootstrap = (
        f"const texts = JSON.parse(require('fs').readFileSync({SOURCE_FD}, 'utf8')), made = {{}};"
        "const load = (name) => { if (!(name in texts)) return require(name);"
        "if (!(name in made)) { const module = made[name] = { exports: {} };"
        "require('vm').compileFunction(texts[name], ['require', 'module'], { filename: 'instavm-' + name })(load, module); }"
        "return made[name].exports; };"
        "load('worker')"
    )
    flags = ("--expose-internals", "--experimental-vm-modules")  # the second: Node 18 lets no cell import() without it
    programs = tuple((name, *flags, "-e", f"(() => {{ {bootstrap} }})()") for name in ("node", "nodejs"))
    return Kind("javascript", programs, source, limit=LIMIT, keeps_late=True)


class Cell(NamedTuple):
    request: int
    code: bytes
    env: dict[str, str]
    timeout_s: float


class Interpreter:
    def __init__(self, agent: Agent, programs: Programs, kind: Kind) -> None:
        self._agent = agent
        self._programs = programs
        self._kind = kind
        self._cgroup = Cgroup(kind.name)
        self._queue: deque[Cell] = deque()
        self._current: Cell | None = None
        self._deadline: float | None = None
        self._began = 0.0
        self._pulse: int | None = None
        self._pulse_at = 0.0
        self._cpu_at_pulse: float | None = None
        self._output_left = 0
        self._restarted = False
        self._doomed = False
        self._reason: str | None = None
        self._interrupted = False
        """Whether the worker was sent an interrupt since its last request, which may still be on its way."""
        self._line: socket.socket | None = None
        self._inbox = bytearray()
        self._number = 0
        self._outputs: Outputs | None = None
        self._late = Log(LATE_BYTES)
        """What was printed since the latest cell ended."""
        self._env: dict[str, str] = {}
        self._cwd = "/app"
        self._begun: dict[str, str] = {}
        """The environment that the worker was started with."""
        self._used = False
        """Whether the worker may hold anything of a user's: then it can't be changed for another one."""
        self._unheeded: list[str] = []
        """Variables that came too late for the worker; the next cell is told."""
        self._retired: set[int] = set()
        """Workers that were ended because another one took their place."""
        self._fresh = 0
        self._new_env: dict[str, str] = {}
        """What came after the worker was started, and it has not heard yet."""
        self._unread = False
        """Whether the worker ended with a request before it that it never took."""
        self._lost = False
        """Whether an interpreter, with all its variables, was lost between two cells: the next answer tells."""

    def configure(self, env: dict[str, str], cwd: str) -> None:
        """What the image asks for; a worker is started when the first cell comes, or by `start`.

        env: the agent's own, which it keeps up to date: what is staged later is there in every worker started later.
        """
        self._env, self._cwd = env, cwd

    def start(self) -> None:
        self._start_worker()

    def rehearse(self) -> None:
        """Keep the worker going through the motions of a cell until it has one. What cells have left is forgotten."""
        self._used = False
        if self._line is not None and self._current is None:
            self._line.sendall(ASK.pack(REHEARSE, 0, 0))

    def identify(self, env: dict[str, str]) -> None:
        """This is another sandbox now. The worker hears it with its next cell, ahead of the cell's code."""
        self._fresh = FRESH
        self._new_env = dict(env)
        self._heed(env)

    def assign(self, env: dict[str, str]) -> None:
        """Whose this is; what has run until now was only to warm it up."""
        self._used = False
        self.stage(env)

    def end_rehearsal(self) -> None:
        """Or a sandbox that is never given a cell would go on with it forever."""
        if self._line is not None and self._current is None:
            self._line.sendall(ASK.pack(ENOUGH, 0, 0))

    def stage(self, env: dict[str, str]) -> None:
        """Variables for every cell from now on; the worker hears them with the next one."""
        self._new_env.update(env)
        self._heed(env)

    def _heed(self, env: dict[str, str]) -> None:
        """Have a worker that heeds what came, if that takes another one and nothing is lost with this one."""
        late = self._kind.too_late(self._begun, env) if self._line is not None else []
        if late and self._used:
            self._unheeded = sorted({*self._unheeded, *late})
        elif late:
            self._retire()
            self._start_worker()

    def _retire(self) -> None:
        assert self._line is not None
        self._agent.unwatch(self._line.fileno())
        self._line.close()
        self._line = None
        if self._pulse is not None:
            os.close(self._pulse)
        self._retired.add(self._number)
        self._programs.signal(self._number, signal.SIGKILL)

    def execute(self, request: int, code: bytes, env: dict[str, str], timeout_s: float) -> None:
        self._queue.append(Cell(request, code, env, timeout_s))
        self._next()

    def cancel(self, request: int) -> None:
        if self._current is not None and self._current.request == request:
            self._interrupt("cancelled")
        for cell in [cell for cell in self._queue if cell.request == request]:
            self._queue.remove(cell)
            self._agent.send(frames.RAN, cell.request, frames.end_payload(0, 0.0, 0.0, 0, "cancelled"))

    def next_deadline(self) -> float | None:
        if self._deadline is None:
            return None
        return self._deadline if self._deadline < self._pulse_at else self._pulse_at

    def expire(self, now: float) -> None:
        if self._deadline is None:
            return
        if self._pulse_at <= now:
            self._pulse_at = now + PULSE_S
            if self._cpu_at_pulse is None and now - self._began > COUNT_CPU_AFTER_S:
                self._cpu_at_pulse = self._cgroup.cpu_s()
            self._beat()
        if self._deadline > now:
            return
        if self._reason is None:
            self._interrupt("timeout")
        else:  # it was interrupted and did not yield
            self._deadline = None
            self._doomed = True  # should it answer after all, no cell must be given to it any more
            self._programs.signal(self._number, signal.SIGKILL)

    def _beat(self) -> None:
        assert self._pulse is not None
        try:
            os.write(self._pulse, b"\0")
        except OSError:
            return  # it has not read the last ones yet, or has just ended

    def _interrupt(self, reason: str) -> None:
        self._reason = reason
        self._deadline = time.monotonic() + INTERRUPT_GRACE_S
        self._interrupted = True
        self._programs.signal(self._number, signal.SIGINT)

    def _kill_children(self) -> None:
        """End what the current cell has started; what earlier cells started stays."""
        self._cgroup.kill_younger(ticks(self._began), self._programs.pid(self._number))

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        source = memory_file(self._kind.source)
        pulse, self._pulse = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._pulse, False)
        outputs = Outputs(self._agent, self._printed_late if self._kind.keeps_late else None)
        fds = [null, *outputs.write_ends(), theirs.fileno(), source, pulse]
        self._line, self._inbox, self._outputs = ours, bytearray(), outputs
        self._output_left = 0
        self._doomed = self._interrupted = self._unread = False
        self._begun, self._used, self._unheeded = dict(self._env), False, []
        self._number = self._programs.spawn(self._kind.programs, self._env, self._cwd, self._cgroup, fds, self._died)
        for fd in (null, source, pulse):
            os.close(fd)
        theirs.close()
        outputs.started()
        self._agent.watch(ours.fileno(), self._heard)

    def _next(self) -> None:
        if self._current is not None or not self._queue:
            return
        if self._line is None:
            self._start_worker()
        assert self._line is not None and self._outputs is not None
        cell = self._current = self._queue.popleft()
        env = {**self._new_env, **cell.env}
        extra = json.dumps(env).encode() if env else b""
        first = bool(self._fresh)
        flags = self._fresh | (AWAIT if self._interrupted else 0)
        limit = self._kind.limit
        code = cell.code if limit is None else limit.pack(int(cell.timeout_s * 1000)) + cell.code
        self._began = time.monotonic()
        try:
            self._line.sendall(ASK.pack(flags, len(code), len(extra)) + code + extra)
        except OSError:
            self._unread = True  # it died just now: _died sees to the cell
        # From here on it works, and we beside it; what it says is heard when we are back in the loop.
        self._deadline = self._began + cell.timeout_s
        self._pulse_at = self._began + (FIRST_PULSE_S if first else PULSE_S)
        self._reason = self._cpu_at_pulse = None
        self._restarted = self._interrupted = False
        self._fresh, self._new_env = 0, {}
        if self._late.end:
            for kind, data in self._late.read(0, LATE_BYTES):
                self._agent.send(kind, cell.request, data)
            self._late = Log(LATE_BYTES)
        self._outputs.belong_to(cell.request)
        self._used = True
        if self._unheeded:
            self._tell_unheeded(cell.request)
        if first:
            self._rehearse_answer()

    def _tell_unheeded(self, request: int) -> None:
        names, self._unheeded = ", ".join(self._unheeded), []
        note = f"[instavm] {names}: read when an interpreter starts; this one keeps its variables and goes on without\n"
        self._agent.send(frames.STDERR, request, note.encode())

    def _printed_late(self, kind: int, data: bytes) -> None:
        self._late.add(kind, data)

    def _rehearse_answer(self) -> None:
        """Go through the motions of an answer while the worker has its first cell, which takes it longer than this.

        Nothing is sent, but an emulator has then translated what comes between the end of the cell and its answer.
        """
        assert self._outputs is not None
        self._outputs.drain()
        _, _, exit_code, wall, cpu, peak_kib = ANSWER.unpack(ANSWER.pack(ANSWERED, 0, 0, 1e-3, 1e-3, 9000))
        frames.encode(frames.RAN, 0, frames.end_payload(exit_code, wall, cpu, peak_kib, None, 0))

    def _heard(self, _fd: int) -> None:
        assert self._line is not None
        try:
            data = self._line.recv(frames.CHUNK if self._output_left else LITTLE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # told of a descriptor that was another one's until just now
        except ConnectionResetError:  # it closed without having read everything
            self._unread, data = True, b""
        except OSError:
            data = b""
        if not data:
            self._agent.unwatch(self._line.fileno())  # its exit is reported by the spawner
            return
        if self._inbox:
            data = bytes(self._inbox) + data
            self._inbox.clear()
        while data:
            data = self._take(data)

    def _take(self, data: bytes) -> bytes:
        """One thing of what the worker said; what is left of `data`."""
        if self._output_left:
            return self._show(data)
        size = ANSWER.size if data[0] == ANSWERED else OUTPUT.size
        if len(data) < size:
            self._inbox += data
            return b""
        if data[0] != ANSWERED:
            assert self._outputs is not None
            self._output_left = OUTPUT.unpack_from(data)[1]
            self._outputs.drain()
            return data[size:]
        _, flags, exit_code, wall, cpu, peak_kib = ANSWER.unpack_from(data)
        if self._current is not None and not self._doomed:
            if not (exit_code in EXITS and 0 <= wall < SECONDS_MAX and 0 <= cpu < SECONDS_MAX and peak_kib < KIB_MAX):
                exit_code, wall, cpu, peak_kib = (
                    1,
                    time.monotonic() - self._began,
                    0.0,
                    0,
                )  # written by a cell, not by its worker
            self._finish(exit_code, wall, cpu, peak_kib, flags & frames.CUT)
        return data[size:]

    def _show(self, data: bytes) -> bytes:
        """Pass on a piece of a rich output as it comes, so that the agent never holds a whole one."""
        piece = data[: min(self._output_left, frames.CHUNK)]
        self._output_left -= len(piece)
        if self._current is not None:
            last = b"\0" if self._output_left else b"\1"
            self._agent.send(frames.OUTPUT, self._current.request, last + piece)
        return data[len(piece) :]

    def _died(self, report: Message) -> None:
        """The worker process ended: crashed, killed, or told to by os._exit()."""
        if report["id"] in self._retired:
            self._retired.remove(report["id"])
            return
        assert self._line is not None
        self._agent.unwatch(self._line.fileno())
        unread = self._unread or self._line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET
        self._line.close()
        self._line = None
        if self._pulse is not None:
            os.close(self._pulse)
            self._pulse = None
        ran = report["exit"] != EXIT_MISSING and not (unread and report["exit"] == EXIT_NOT_STARTED)
        if self._current is None:
            self._lost = ran
        elif (
            ran and unread and not self._lost and self._reason is None
        ):  # an earlier cell's doing: this one has not begun, so the next worker gets it
            self._lost = True
            self._queue.appendleft(self._current)
            self._current = self._deadline = None
            self._next()
        else:
            self._restarted = ran
            wall = time.monotonic() - self._began
            self._finish(report["exit"], wall, self._cpu_until_death(wall), report["rss_kib"], 0)
            if self._restarted and self._line is None:
                self._start_worker()  # at once: the next cell's time shall be its own

    def _cpu_until_death(self, wall: float) -> float:
        """The worker did not live to tell. Counted from soon after the cell began; before that, all that was possible."""
        spent = self._cgroup.cpu_s() - self._cpu_at_pulse if self._cpu_at_pulse is not None else wall
        return min(spent, wall * (os.cpu_count() or 1))

    def _finish(self, exit_code: int, wall: float, cpu: float, peak_kib: int, flags: int) -> None:
        cell, self._current, self._deadline = self._current, None, None
        assert cell is not None and self._outputs is not None
        if self._reason is not None:
            self._kill_children()
        self._outputs.end(self._line is not None)
        reason = self._reason
        if reason is None and exit_code != 0:
            reason = self._why(exit_code)
        if self._restarted or self._lost:
            flags, self._lost = flags | frames.RESTARTED, False
        self._agent.send(frames.RAN, cell.request, frames.end_payload(exit_code, wall, cpu, peak_kib, reason, flags))
        self._next()

    def _why(self, exit_code: int) -> str | None:
        """What ended a cell that failed, if it was not its own code."""
        refused = self._cgroup.refused()
        if self._restarted:
            return refused or "interpreter_crashed"
        if exit_code == EXIT_MISSING and self._line is None:
            return "interpreter_missing"
        return refused or ("disk_full" if disk_is_full(USER_ROOT) else None)
