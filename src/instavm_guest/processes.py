"""Processes that run on in the background: the guest keeps them and what they write; servers come, ask and go.

Nothing of them is sent to the host but what it asks for, so a process that writes without end costs the host nothing.
"""

from __future__ import annotations

import base64
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from instavm_guest import frames
from instavm_guest.frames import Message
from instavm_guest.programs import Outputs, Programs
from instavm_guest.world import USER_ROOT, Cgroup, disk_is_full

if TYPE_CHECKING:
    from instavm_guest.agent import Agent

RUNNING_MAX = 64
ENDED_MAX = 32
"""Of those that have ended so many are remembered; of more, the ones that ended first go."""
LOG_BYTES = 1 << 20
"""Kept of one process's output: the latest so many bytes."""
ALL_BYTES = 8 << 20
"""Kept of all of them together, in the memory that is set aside for the agent; of more, the longest gives way."""
INPUT_BYTES = 1 << 20
"""What may wait for a process that does not read its stdin."""
PIECE_COST = 128
"""What a piece costs besides its bytes."""


class Refused(Exception):
    """A request about a process that cannot be carried out; `code` is the protocol's."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(text)


class Log:
    """The latest of what a process wrote, in order, on both streams. Positions count its bytes since it was started."""

    def __init__(self, limit: int = LOG_BYTES) -> None:
        """limit: bytes that are kept."""
        self._limit = limit
        self._pieces: deque[tuple[int, bytearray]] = deque()
        self.begin = 0
        self.end = 0

    @property
    def cost(self) -> int:
        return self.end - self.begin + PIECE_COST * len(self._pieces)

    def add(self, kind: int, data: bytes) -> None:
        self.end += len(data)
        if self._pieces and self._pieces[-1][0] == kind and len(self._pieces[-1][1]) + len(data) <= frames.CHUNK:
            self._pieces[-1][1].extend(data)
        else:
            self._pieces.append((kind, bytearray(data)))
        while self.cost > self._limit:
            self.shorten()

    def shorten(self) -> None:
        """Forget the oldest piece. There must be one."""
        self.begin += len(self._pieces.popleft()[1])

    def read(self, since: int, size: int) -> Iterator[tuple[int, bytes]]:
        """At most `size` bytes from position `since`, or from the oldest that is kept, as (kind, bytes)."""
        at = self.begin
        for kind, data in self._pieces:
            piece = data[max(0, since - at) :][:size] if at + len(data) > since else b""
            at += len(data)
            size -= len(piece)
            if piece:
                yield kind, bytes(piece)
            if size <= 0:
                return


class Process:
    def __init__(self, agent: Agent, ask: Message, kept: Callable[[], None]) -> None:
        self.name: str = ask["name"]
        self.command: object = ask["command"]
        self.cwd: str = ask["cwd"]
        self.started_at = time.time()
        self.log = Log()
        self.pid: int | None = None
        self.number = 0
        self.cgroup = Cgroup(f"process-{self.name}")
        self.ended: bytes | None = None
        """How, as RAN would tell it."""
        self.waiting: dict[int, Message] = {}
        """Requests that are answered once there is something to tell, by number."""
        self._agent = agent
        self._began = time.monotonic()
        self._kept = kept
        self._input = bytearray()
        self._last_input = False
        self.stdin, self._write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write_end, False)
        self.outputs = Outputs(agent, self._wrote)

    def state(self) -> Message:
        told = {
            "name": self.name,
            "command": self.command,
            "cwd": self.cwd,
            "pid": self.pid,
            "started_ns": int(self.started_at * 1e9),
            "begin": self.log.begin,
            "end": self.log.end,
            "stdin": self._write_end >= 0 and not self._last_input,
        }
        return told if self.ended is None else {**told, "ended": self.ended.hex()}

    def started(self) -> None:
        os.close(self.stdin)
        self.outputs.started()

    def exited(self, report: Message) -> None:
        self.outputs.end()
        reason = None
        if report["exit"] != 0:
            reason = self.cgroup.refused() or ("disk_full" if disk_is_full(USER_ROOT) else None)
        wall, cpu = time.monotonic() - self._began, max(report["cpu"], self.cgroup.cpu_s())
        self.ended = frames.end_payload(report["exit"], wall, cpu, report["rss_kib"], reason)
        self.close_input()
        self.tell()

    def tell(self) -> None:
        """Answer whoever waits for what is there now."""
        for request in [one for one, ask in self.waiting.items() if self.answers(ask)]:
            self.answer(request, self.waiting.pop(request))

    def answers(self, ask: Message) -> bool:
        return self.ended is not None or (ask["until"] == "more" and self.log.end != ask["since"])

    def answer(self, request: int, ask: Message) -> None:
        for kind, data in self.log.read(ask["since"], ask["size"]):
            self._agent.send(kind, request, data)
        self._agent.answer(request, self.state())

    def write(self, data: bytes, last: bool) -> None:
        """Give its stdin `data`, and then its end if it is the `last`. Raises: Refused; then nothing was taken."""
        if self.ended is not None:
            raise Refused("process_ended", "it has ended")
        if self._write_end < 0 or self._last_input:
            raise Refused("stdin_closed", "its stdin is closed")
        if len(self._input) + len(data) > INPUT_BYTES:
            raise Refused("stdin_full", f"{len(self._input)} bytes wait for it already, and it does not read")
        self._input += data
        self._last_input = last
        self._pass_on(self._write_end)
        if self._input:
            self._agent.watch(self._write_end, self._pass_on)
            self._agent.interest(self._write_end, select.POLLOUT)

    def _pass_on(self, fd: int) -> None:
        try:
            while self._input:
                del self._input[: os.write(fd, self._input)]
        except BlockingIOError:
            return
        except OSError:
            self.close_input()  # nobody reads it any more
            return
        self._agent.unwatch(fd)
        if self._last_input:
            self.close_input()

    def close_input(self) -> None:
        self._input.clear()
        if self._write_end >= 0:
            self._agent.unwatch(self._write_end)
            os.close(self._write_end)
            self._write_end = -1

    def _wrote(self, kind: int, data: bytes) -> None:
        self.log.add(kind, data)
        self._kept()
        if self.waiting:
            self.tell()


class Processes:
    def __init__(self, agent: Agent, programs: Programs) -> None:
        self._agent = agent
        self._programs = programs
        self._known: dict[str, Process] = {}

    def handle(self, request: int, ask: Message, env: dict[str, str]) -> None:
        """One request. Raises: Refused, and what the request is to fail with."""
        if ask["do"] == "start":
            self._start(request, ask, env)
            return
        if ask["do"] == "list":
            for one in self._known.values():
                self._agent.send(frames.STDOUT, request, frames.json_payload(one.state()) + b"\n")
            self._agent.answer(request, {})
            return
        process = self._known.get(ask["name"])
        if process is None:
            raise Refused("no_process", "this sandbox knows no such process")
        if ask["do"] == "read":
            if ask["until"] == "now" or process.answers(ask):
                process.answer(request, ask)
            else:
                process.waiting[request] = ask
            return
        if ask["do"] == "write":
            process.write(base64.b64decode(ask["data"]), ask["last"])
        else:
            self._signal(process, ask["signal"])
        self._agent.answer(request, process.state())

    def cancel(self, request: int) -> None:
        """The one who asked does not wait any more. The process itself goes on."""
        for process in self._known.values():
            process.waiting.pop(request, None)

    def forget_waiting(self) -> None:
        """Another server has taken over: nobody waits for what the last one asked."""
        for process in self._known.values():
            process.waiting.clear()

    def _start(self, request: int, ask: Message, env: dict[str, str]) -> None:
        if (process := self._known.get(ask["name"])) is not None:
            self._agent.answer(request, process.state())
            return
        self._forget()
        if sum(one.ended is None for one in self._known.values()) >= RUNNING_MAX:
            raise Refused("too_many", f"{RUNNING_MAX} processes run already")
        process = Process(self._agent, ask, self._bound)
        fds = [process.stdin, *process.outputs.write_ends()]

        def on_start(pid: int) -> None:
            process.pid = pid
            self._agent.answer(request, process.state())

        try:
            process.number = self._programs.spawn(
                [tuple(ask["argv"])],
                {**env, **ask["env"]},
                ask["cwd"],
                process.cgroup,
                fds,
                lambda report: self._exited(process, report),
                on_start=on_start,
            )
        except OSError:
            process.close_input()
            self._programs.release(process.cgroup)
            raise
        finally:
            process.started()
        self._known[process.name] = process

    def _exited(self, process: Process, report: Message) -> None:
        process.exited(report)
        self._known[process.name] = self._known.pop(process.name)  # in the order in which they ended
        self._programs.release(process.cgroup)

    def _signal(self, process: Process, signum: int) -> None:
        """To all that the process has started in its group; KILL to all that it has started in whatever way."""
        if signum == signal.SIGKILL:
            try:
                process.cgroup.kill()
            except FileNotFoundError:
                pass  # it has ended, and nothing that it started is left
        elif process.ended is not None:
            raise Refused("process_ended", "it has ended")
        else:
            self._programs.signal(process.number, signum, group=True)

    def _bound(self) -> None:
        while sum(one.log.cost for one in self._known.values()) > ALL_BYTES:
            max(self._known.values(), key=lambda one: one.log.cost).log.shorten()

    def _forget(self) -> None:
        ended = [name for name, one in self._known.items() if one.ended is not None]
        for name in ended[: max(0, len(ended) - ENDED_MAX + 1)]:
            del self._known[name]
