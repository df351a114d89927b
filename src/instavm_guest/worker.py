"""The interpreter whose state persists: runs cells of Python in the image's own Python (3.8 or newer), one at a time.

It is read into that Python as text (`python3 -c`, sources on a descriptor) together with `outputs` and `notebook`, which are
imported only when a cell needs them: this file is the path of a plain `print(1)`, and right after a restore each step on
it costs translation. The agent sends flags and two lengths (ASK), then the cell's code and its environment as JSON; back come
rich outputs (OUTPUT) while the cell runs, and at its end what it took (ANSWER).
"""

from __future__ import annotations

import _thread
import ast
import builtins
import fcntl
import io
import json
import linecache
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

LINE_FD = 3
SOURCE_FD = 4
PULSE_FD = 5
HIGH_FD = 700
ASK = struct.Struct("!BII")
OUTPUT = struct.Struct("!BI")
ANSWER = struct.Struct("!BBiddQ")
FRESH = 1  # first cell in a new sandbox: generators must not go on where the template's were
REHEARSE = 2  # no cell; go through the motions of one, again and again, until the next request comes
ENOUGH = 4  # no cell; only an end to the rehearsal
AWAIT = 8  # an earlier cell was sent an interrupt, which must have arrived before this one begins
AHEAD_BYTES = 4096
"""How much is read at least: most requests come in one piece."""
AWAIT_MS = 500
"""How long it is waited for at most: the user's code may have taken the signal away from us."""
ANSWERED, SHOWN = 0, 1  # first byte of what the worker sends
CUT = 1  # a flag of an answer: outputs were dropped; the same as in frames.py, which is not in here

CO_COROUTINE = 0x80
PACKAGE = "instavm_guest"
OURS = "<instavm"
"""How the file names of our own code begin; no traceback shows them."""
PLAIN = frozenset({int, float, str, bool, bytes, list, tuple, dict, set, complex})
"""Types that have no richer form than their text."""


class Line:
    """The socket to the agent, kept out of the way of user code that closes descriptors it did not open."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=moved_up(fd))
        self._ahead = b""
        self._sending = _thread.allocate_lock()

    def receive(self) -> tuple[int, str, dict[str, str]] | None:
        """The next request as (flags, code, environment), or None when the agent is gone."""
        head = self._exactly(ASK.size)
        if not head:
            return None
        flags, code_size, env_size = ASK.unpack(head)
        code = self._exactly(code_size).decode("utf-8", "surrogatepass") if code_size else ""
        return flags, code, json.loads(self._exactly(env_size)) if env_size else {}

    def send(self, data: bytes) -> None:
        with self._sending:  # a thread of the user's may be showing something
            self._socket.sendall(data)

    def discard(self, size: int) -> None:
        self._socket.recv(size)

    def waiting(self) -> bool:
        """Whether a request is there to be read."""
        return bool(self._ahead) or bool(select.select([self._socket], [], [], 0)[0])

    def _exactly(self, size: int) -> bytes:
        data = self._ahead
        while len(data) < size:
            more = self._socket.recv(max(size - len(data), AHEAD_BYTES))
            if not more:
                return b""
            data += more
        self._ahead = data[size:]
        return data[:size]


class Sources:
    """Imports the other files of ours from memory, and tells who waits for a module when it has been imported."""

    def __init__(self, sources: dict[str, str], after: dict[str, Callable[[], None]]) -> None:
        self._sources = sources
        self._after = after

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in self._sources:
            return ModuleSpec(name, self, is_package=name == PACKAGE)  # type: ignore[arg-type]
        if name in self._after:
            return self._watched(name, path, target)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        exec(compile(self._sources[name], OURS + " " + name + ">", "exec", dont_inherit=True), module.__dict__)

    def _watched(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        """The spec that the other finders have, which calls us back once the module is there."""
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._call_after(spec.loader)
                return spec
        return None

    def _call_after(self, loader: Any) -> None:
        execute = loader.exec_module

        def then(module: types.ModuleType) -> None:
            execute(module)
            self._after.pop(module.__name__)()

        loader.exec_module = then


class Space:
    """The user's namespace, and what belongs to it: outputs, event loop, notebook syntax."""

    def __init__(self, line: Line) -> None:
        self.module = types.ModuleType("__main__")
        self.names: dict[str, Any] = self.module.__dict__
        self.names["__builtins__"] = builtins
        self.own = set(self.names)
        self.running = False
        """Whether an interrupt is for the cell."""
        self.interrupts = 0
        """Interrupts that have arrived since the latest cell began."""
        self.starting = False
        """Whether it is us who import IPython, just now."""
        self.number = 0
        self.cut = False
        self.shown = 0
        """Bytes of outputs of this cell."""
        self.count = 0
        self.line = line
        self._me = os.getpid()
        self._loop: Any = None

    def show(self, value: object) -> None:
        """A last expression's value: as text, like the interactive interpreter, and in its richer forms."""
        sys.displayhook(value)
        if type(value) not in PLAIN and value is not None:
            from instavm_guest import outputs  # noqa: PLC0415

            outputs.of(self).add(value)

    def send(self, payload: bytes) -> None:
        """One output, as JSON. A fork of the worker has no line of its own to the agent: it stays silent."""
        if os.getpid() == self._me:
            flush()
            self.line.send(OUTPUT.pack(SHOWN, len(payload)) + payload)

    def wait_for(self, coroutine: Any) -> Any:
        """Run a coroutine on the one event loop of this interpreter; its other tasks go on meanwhile."""
        import asyncio  # noqa: PLC0415

        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except (KeyboardInterrupt, SystemExit):
            task.cancel()
            self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise

    def await_interrupt(self) -> None:
        """Let an interrupt that was meant for an earlier cell come now, when it does no harm."""
        for _ in range(AWAIT_MS):
            if self.interrupts:
                return
            select.select([], [], [], 0.001)

    def clean(self) -> None:
        """Forget what cells have left: the names of a template's warm-up are not the user's."""
        for name in [name for name in self.names if name not in self.own]:
            del self.names[name]
        self.number = 0


class Cell:
    """One piece of code with a name under which tracebacks find its source."""

    def __init__(self, number: int, source: str) -> None:
        self.name = f"<cell {number}>"
        self.source = source
        linecache.cache[self.name] = (len(source), None, source.splitlines(True), self.name)

    def run(self, space: Space) -> None:
        """Execute; a last expression's value is shown as the interactive interpreter shows it."""
        if "\n" not in self.source:  # most one-liners are an expression, and that is the shorter way
            try:
                whole = self._compiled(self.source, "eval")
            except (SyntaxError, ValueError):
                pass
            else:
                space.show(self._evaluated(whole, space))
                return
        tree = self._parsed(space)
        last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        if tree.body:
            self._evaluated(self._compiled(tree, "exec"), space)
        if isinstance(last, ast.Expr):
            value = self._evaluated(self._compiled(ast.Expression(last.value), "eval"), space)
            if not self.source.rstrip().endswith(";"):
                space.show(value)

    def _parsed(self, space: Space) -> Any:
        try:
            return self._compiled(self.source, "exec", ast.PyCF_ONLY_AST)
        except SyntaxError:
            from instavm_guest import notebook  # noqa: PLC0415

            plain = notebook.of(space).translated(self.source)
            if plain is None:
                raise
        return self._compiled(plain, "exec", ast.PyCF_ONLY_AST)

    def _compiled(self, source: Any, mode: str, flags: int = 0) -> Any:
        return compile(source, self.name, mode, flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)

    def _evaluated(self, code: Any, space: Space) -> Any:
        value = eval(code, space.names)
        return space.wait_for(value) if code.co_flags & CO_COROUTINE else value


def reseed() -> None:
    """Every generator that may already be loaded starts again from the kernel's, which has been reseeded before."""
    modules = sys.modules
    if "random" in modules:
        modules["random"].seed()
    if "numpy.random" in modules:
        modules["numpy.random"].seed()
    if "_ssl" in modules:  # OpenSSL notices a fork of its process, but not one of its machine
        modules["_ssl"].RAND_add(os.urandom(48), 48.0)


def moved_up(fd: int, copy: bool = False) -> int:
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
    if not copy:
        os.close(fd)
    return high


def report() -> None:
    """Write the current exception as Python would, without the frames that are not the user's."""
    kind, value, trace = sys.exc_info()
    assert kind is not None and value is not None
    told = traceback.TracebackException(kind, value, trace)
    _without_ours(told, set())
    sys.stderr.write("".join(told.format()))


def _without_ours(told: Any, seen: set[int]) -> None:
    if told is None or id(told) in seen:
        return
    seen.add(id(told))
    if any(frame.filename.startswith("<cell ") for frame in told.stack):
        told.stack[:] = [frame for frame in told.stack if not _hidden(frame.filename)]
    else:
        told.stack[:] = [frame for frame in told.stack if not frame.filename.startswith(OURS)]
    for other in (told.__cause__, told.__context__, *(getattr(told, "exceptions", None) or ())):
        _without_ours(other, seen)


def _hidden(filename: str) -> bool:
    return filename.startswith(OURS) or "/IPython/" in filename


def run(cell: Cell, space: Space) -> int:
    """The exit code of `cell`: 0, 1 after an exception, or what sys.exit() was given."""
    try:
        cell.run(space)
    except SystemExit as exc:
        if exc.code is None or isinstance(exc.code, int):
            return (exc.code or 0) & 0xFF
        print(exc.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        report()
        return 130
    except BaseException:
        report()
        return 1
    return 0


def finished(cell: Cell, space: Space) -> int:
    """Run `cell`, and show the figures that it left open. An interrupt may come at any moment of this."""
    try:
        space.running = True
        code = run(cell, space)
        if "matplotlib.pyplot" in sys.modules:
            from instavm_guest import outputs  # noqa: PLC0415

            outputs.of(space).figures()
        return code
    except KeyboardInterrupt:
        return 130
    except BaseException:  # stderr is closed, memory is gone: the exit code has to tell it alone
        return 1
    finally:
        space.running = False


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the user's code closed or replaced it


def perform(line: Line, code: str, space: Space, meter: Meter, streams: Streams) -> int:
    """One cell from its code to its answer; the exit code."""
    streams.mend()
    space.number += 1
    space.cut, space.shown, space.count, space.interrupts = False, 0, 0, 0
    meter.start()
    exit_code = finished(Cell(space.number, code), space)
    flush()
    meter.stop()
    if os.getpid() != meter.me:
        os._exit(exit_code)  # a fork that ran off the end of the cell
    line.send(ANSWER.pack(ANSWERED, CUT if space.cut else 0, exit_code, meter.wall_s, meter.cpu_s, meter.peak_kib))
    meter.renew()
    return exit_code


class Meter:
    """What a cell takes: wall clock, CPU with the children that were waited for, and the peak of resident memory."""

    def __init__(self) -> None:
        self.me = os.getpid()
        self.wall_s = self.cpu_s = 0.0
        self.peak_kib = 0
        self._children = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            self._refs = moved_up(os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            self._refs = -1
        self.renew()

    def renew(self) -> None:
        """The peak starts anew; when a cell comes it may be waited for already. proc(5), clear_refs"""
        if self._refs >= 0:
            try:
                os.write(self._refs, b"5")
            except OSError:
                self._refs = -1

    def start(self) -> None:
        if _thread._count() > 1:  # else nobody can have waited for a child since the last cell
            self._children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall_s = time.perf_counter() - self._wall
        own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        before, self._children = self._children, children
        cpu = own.ru_utime + own.ru_stime - self._cpu
        cpu += children.ru_utime + children.ru_stime - before.ru_utime - before.ru_stime
        self.cpu_s = max(0.0, cpu)
        self.peak_kib = max(own.ru_maxrss, children.ru_maxrss if children.ru_maxrss > before.ru_maxrss else 0)


class Streams:
    """stdout and stderr as they were, to come back when a cell has closed them; flushed when the agent says so."""

    def __init__(self) -> None:
        self._streams = (sys.stdout, sys.stderr)
        self._spare = tuple(moved_up(number, copy=True) for number in (1, 2))

    def listen(self, pulse: int) -> None:
        """The agent writes a byte now and then while a cell runs: what was printed without a newline goes out then."""
        pulse = moved_up(pulse)
        warnings.filterwarnings("ignore", r".*multi-threaded, use of (os\.)?fork", DeprecationWarning)
        _thread.start_new_thread(self._flush_on, (pulse,))

    def mend(self) -> None:
        if not (sys.stdout is None or sys.stdout.closed or sys.stderr is None or sys.stderr.closed):
            return
        for number, spare in zip((1, 2), self._spare):  # noqa: B905 (Python 3.8)
            os.dup2(spare, number)
        sys.stdout, sys.stderr = (stream_on(number) for number in (1, 2))
        self._streams = (sys.stdout, sys.stderr)

    def _flush_on(self, pulse: int) -> None:
        while True:
            try:
                if not os.read(pulse, 4096):
                    return
                for stream in self._streams:
                    stream.flush()
            except ValueError:
                continue  # closed by the cell
            except OSError:
                return


def stream_on(fd: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def no_input(prompt: object = "") -> str:
    """Stands in for input()."""
    raise EOFError("input() can't be answered: nobody is at the keyboard of a sandbox. Set a variable instead.")


def main(sources: dict[str, str]) -> None:
    line = Line(LINE_FD)
    space = Space(line)
    sys.modules["__main__"] = space.module
    sys.argv = [""]
    sys.path.insert(0, "")
    sys.meta_path.insert(0, Sources(sources, _after(space)))
    builtins.input = no_input
    setattr(builtins, "display", lambda *values, **_: _display(space, values))  # noqa: B010
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    streams = Streams()
    streams.listen(PULSE_FD)
    meter = Meter()
    _interrupt_only_cells(space)
    while True:
        ask = line.receive()
        if ask is None:
            os._exit(0)
        flags, code, env = ask
        if flags & REHEARSE:
            space.clean()
            rehearse(line, meter, streams)
            continue
        if flags & ENOUGH:
            continue
        if flags & AWAIT:
            space.await_interrupt()
        if flags & FRESH:
            reseed()
        if env:
            os.environ.update(env)
        perform(line, code, space, meter, streams)


def _after(space: Space) -> dict[str, Callable[[], None]]:
    def pyplot() -> None:
        from instavm_guest import outputs  # noqa: PLC0415

        outputs.of(space).take_pyplot()

    def ipython() -> None:
        from instavm_guest import notebook  # noqa: PLC0415

        if not space.starting:
            notebook.of(space)

    return {"matplotlib.pyplot": pyplot, "IPython": ipython}


def _display(space: Space, values: Sequence[object]) -> None:
    """Stands in for display() of a notebook."""
    for value in values:
        print(value if type(value) is str else repr(value))
        if type(value) not in PLAIN:
            from instavm_guest import outputs  # noqa: PLC0415

            outputs.of(space).add(value)


def _interrupt_only_cells(space: Space) -> None:
    def interrupted(signum: int, frame: object) -> None:
        space.interrupts += 1
        if space.running:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)


_PROPS: list[object] = []
"""What a rehearsal stood on. Never closed: that would be the first thing a clone does, just when its first cell comes."""


def rehearse(line: Line, meter: Meter, streams: Streams) -> None:
    """Go through the motions of a cell, into the void and a namespace of its own, until a request is there.

    A template is saved while this runs. So a clone's interpreter goes on with it from the first moment, beside the agent
    that gets its identity, and by the time that the user's code comes an emulator has translated what it needs.
    """
    here, there = socket.socketpair()
    mirror, echo = Line(here.detach()), Line(there.detach())
    void = stream_on(moved_up(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)))
    _PROPS.append((mirror, echo, void))
    kept, sys.stdout = sys.stdout, void
    space = Space(mirror)
    try:
        while not line.waiting():
            code = "print(1)"
            echo.send(ASK.pack(0, len(code), 0) + code.encode())
            mirror.receive()
            reseed()
            space.number = -1
            perform(mirror, code, space, meter, streams)
            echo.discard(ANSWER.size)
    finally:
        sys.stdout = kept


if __name__ == "__main__":
    main(globals()["SOURCES"])
