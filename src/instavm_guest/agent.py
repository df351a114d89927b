"""The agent: one thread, one poll loop between the host, the interpreter and the programs that are running."""

from __future__ import annotations

import os
import platform
import select
import time
from collections.abc import Callable

from instavm_guest import frames, kernel, link, spawner, world
from instavm_guest.disk import Disk
from instavm_guest.files import Files
from instavm_guest.frames import Message
from instavm_guest.interpreter import Interpreter, javascript, python
from instavm_guest.kept import Tasks
from instavm_guest.processes import Processes, Refused
from instavm_guest.programs import PASSED_ON, Programs

SHELLS = {
    "bash": (("bash", "-c"),),
    "sh": (("sh", "-c"),),
}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Agent:
    def __init__(self) -> None:
        world.set_up()
        kernel.stop_interval_timer()
        self._identity = world.Identity()
        _, line = spawner.start(world.USER_ROOT)
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._poll = select.poll()
        self._env = {"PATH": PATH, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "SHELL": "/bin/bash"}
        self._cwd = "/app"
        self._identified = False
        self._programs = Programs(self, line)
        self._interpreter = Interpreter(self, self._programs, python())
        self._javascript = Interpreter(self, self._programs, javascript())
        self._files = Files(self, self._programs)
        self._tasks = Tasks(self.send)
        self._processes = Processes(self, self._programs)
        self._disk = Disk()
        self._link = link.open_link(_hello())
        self._decoder = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX)

    # what programs and the interpreter need of the loop

    def watch(self, fd: int, handler: Callable[[int], object]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def interest(self, fd: int, events: int) -> None:
        """What to wait for on a watched descriptor; with 0 not even its end is told."""
        self._poll.register(fd, events)
        if not events:
            self._poll.unregister(fd)

    def unwatch(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self.interest(fd, 0)

    def send(self, kind: int, request: int, payload: bytes) -> None:
        if self._tasks.running:
            request = self._tasks.take(kind, request, payload)
        self._link.write(frames.encode(kind, request, payload))

    def answer(self, request: int, message: Message) -> None:
        self.send(frames.DONE, request, frames.json_payload(message))

    def fail(self, request: int, code: str, text: str) -> None:
        self.send(frames.FAILED, request, frames.json_payload({"code": code, "message": text[:4000]}))

    # the loop

    def run(self) -> None:
        poll, handlers = self._poll, self._handlers
        timers = (self._programs, self._interpreter, self._javascript, self._disk)
        host = self._link.fileno()
        poll.register(host, select.POLLIN)
        deadline: float | None = None
        while True:
            wait = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000 + 1)
            changed = False
            for fd, event in poll.poll(wait):
                if fd == host:
                    self._from_host(event)
                    changed = True
                elif fd in handlers and handlers[fd](fd) is not PASSED_ON:
                    changed = True
            if deadline is not None and time.monotonic() >= deadline:
                changed = True
                for timer in timers:
                    timer.expire(time.monotonic())
            if changed:
                deadline = min((at for timer in timers if (at := timer.next_deadline()) is not None), default=None)

    def _from_host(self, event: int) -> None:
        data = self._link.read()
        if data is None:
            self._decoder = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX)
            return
        if not data:
            if event & select.POLLHUP:
                self._decoder = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX)
                time.sleep(link.HOST_AWAY_S)
            return
        try:
            received = self._decoder.feed(data)
        except frames.FrameError:  # what a server that died had half-sent; the one that takes over asks again
            self._decoder = frames.Decoder(frames.FROM_HOST, frames.HOST_PAYLOAD_MAX)
            return
        for kind, request, payload in received:
            try:
                if kind == frames.EXECUTE:
                    self._execute(request, payload)
                elif kind >= frames.PUT:
                    self._file(kind, request, payload)
                else:
                    self._handle(kind, request, frames.decode_json(payload))
            except Refused as exc:
                self.fail(request, exc.code, str(exc))
            except Exception as exc:  # the edge of one request: it fails, the agent goes on
                self.fail(request, "agent_error", f"{type(exc).__name__}: {exc}")

    def _handle(self, kind: int, request: int, message: Message) -> None:
        if kind == frames.IDENTIFY:
            self._identified = False
            self._identity.take(message)
            self._env.update(message["env"])
            self._interpreter.identify(message["env"])
            self._named(request)
            self._interpreter.end_rehearsal()
        elif kind == frames.ASSIGN:
            self._require_identity()
            self._identified = False
            self._identity.name(message)
            self._env.update(message["env"])
            self._interpreter.assign(message["env"])
            self._named(request)
        elif kind == frames.CLOCK:
            world.set_clock(message["time_ns"])
        elif kind == frames.CONFIGURE:
            self._env.update(message["env"])
            self._cwd = message["cwd"]
            self._interpreter.configure(self._env, self._cwd)
            self._javascript.configure(self._env, self._cwd)
            self._interpreter.start()
            self._identified = True  # template time: nobody's code runs yet but our own warm-up
            self.answer(request, {})
        elif kind == frames.REST:
            self._interpreter.rehearse()
            self.answer(request, {})
        elif kind == frames.CANCEL:
            self._programs.cancel(request)
            self._interpreter.cancel(request)
            self._javascript.cancel(request)
            self._files.cancel(request)
            self._processes.cancel(request)
        elif kind == frames.PROCESS:
            self._require_identity()
            self._processes.handle(request, message, self._env)
        elif kind == frames.SYNC:
            self._processes.forget_waiting()
            self.send(frames.SYNCED, 0, message["token"].encode())
        elif kind == frames.FREEZE:
            self._disk.freeze()
            self.answer(request, {})
        elif kind == frames.THAW:
            self.answer(request, {"held": self._disk.thaw()})
        elif kind == frames.STAGE_ENV:
            self._env.update(message["env"])
            self._interpreter.stage(message["env"])
            self._javascript.stage(message["env"])
            self.answer(request, {})

    def _named(self, request: int) -> None:
        self._identified = True
        self.answer(request, {"time_ns": time.time_ns()})

    def _require_identity(self) -> None:
        if not self._identified:
            raise Refused("not_identified", "this clone has no identity of its own yet")

    def _execute(self, request: int, payload: bytes) -> None:
        self._require_identity()
        language, timeout_ms, code, env, task = frames.read_execute(payload)
        if task:
            if self._tasks.joined(task, request):
                return
            if not code or self._tasks.forgotten(task):
                self.fail(request, "unknown_task", "this sandbox does not know what became of that task")
                return
            self._tasks.begin(task, request)
        timeout_s = timeout_ms / 1000
        if language == "python":
            self._interpreter.execute(request, code, env, timeout_s)
        elif language == "javascript":
            self._javascript.execute(request, code, env, timeout_s)
        else:
            programs = [(*shell, code.decode("utf-8", "surrogatepass")) for shell in SHELLS[language]]
            self._programs.run(request, programs, {**self._env, **env} if env else self._env, self._cwd, timeout_s)

    def _file(self, kind: int, request: int, payload: bytes) -> None:
        self._require_identity()
        self._files.handle(kind, request, payload)


def _hello() -> bytes:
    message = {"protocol": frames.PROTOCOL, "python": platform.python_version(), "kernel": os.uname().release}
    return frames.encode_json(frames.HELLO, 0, message)


def main() -> None:
    Agent().run()
