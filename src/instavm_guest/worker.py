"""The interpreter whose state persists: runs cells of Python in the image's own Python (3.8 or newer), one at a time.

It is read into that Python as text (`python3 -c`, sources on a descriptor) together with its other parts (PARTS), which are
loaded only when a cell needs them: this file is the path of a plain `print(1)`, and right after a restore each step on
it costs translation. The agent sends flags and two lengths (ASK), then the cell's code and its environment as JSON; back come
rich outputs (OUTPUT) while the cell runs, and at its end what it took (ANSWER).

A cell may replace whatever Python lets it reach: streams, clocks, modules, builtins. So what is done around a cell uses names
bound in here before the first one came, with builtins of its own, and no failure of it ends the interpreter.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import ast
import builtins
import fcntl
import io
import json
import linecache
import os
import re
import select
import socket
import struct
import sys
import types
import warnings
from _contextvars import copy_context
from collections.abc import Callable, Sequence
from contextlib import suppress
from os import _exit, close, dup2, getpid, read, write
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from sys import getprofile, getrecursionlimit, gettrace, setprofile, setrecursionlimit, settrace
from time import perf_counter, process_time
from traceback import TracebackException
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
PARTS = ("worker", "outputs", "portable", "notebook", "interactive", "magics", "loops", "environment")
LAST = "<last>"
"""Under this name, which no program can write, a cell leaves its last expression's value."""
QUIET = re.compile(r"(?:[\s)\\]|#[^\n]*\n)*;")
"""What stands behind a last expression that is not to be shown."""
RECURSION_MIN = 250
"""A lower limit of recursion holds for its own cell only: what comes after it needs some itself."""
SETTINGS = ("TZ", "PYTHON", "LC_", "LANG")
"""How the names of variables begin that Python has read before they came."""
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

    def fileno(self) -> int:
        return self._socket.fileno()

    def waiting(self) -> bool:
        """Whether a request is there to be read."""
        return bool(self._ahead) or bool(select.select([self._socket], [], [], 0)[0])

    def _exactly(self, size: int) -> bytes:
        data = self._ahead
        while len(data) < size:
            try:
                more = self._socket.recv(max(size - len(data), AHEAD_BYTES))
            except OSError:  # a cell has closed it: nobody can ask us anything any more
                more = b""
            if not more:
                return b""
            self._ahead = data = data + more  # at once: a signal's handler may raise any time
        self._ahead = data[size:]
        return data[:size]


class Parts:
    """Our other files: loaded from memory, and out of the way of what a cell does to sys.modules."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._sources = sources
        self._loaded: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        found = self._loaded.get(name)
        if found is None:
            whole = PACKAGE + "." + name
            found = types.ModuleType(whole)
            found.__dict__["__builtins__"] = globals()["__builtins__"]
            code = compile(self._sources[whole], OURS + " " + whole + ">", "exec", dont_inherit=True)
            exec(code, found.__dict__)
            self._loaded[name] = found
        return found


class Watch:
    """Tells who waits for a module of somebody else's when it has been imported."""

    def __init__(self, after: dict[str, Callable[[], None]]) -> None:
        self._after = after

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return self._watched(name, path, target) if name in self._after else None

    def _watched(self, name: str, path: Any, target: Any) -> Any:
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

    def __init__(self, line: Line, part: Parts, streams: Streams) -> None:
        self.module = types.ModuleType("__main__")
        self.names: dict[str, Any] = self.module.__dict__
        self.names["__builtins__"] = builtins
        self.own = set(self.names)
        self.part = part
        self.streams = streams
        self.running = False
        """Whether an interrupt is for the cell."""
        self.interrupts = 0
        """Interrupts that have arrived since the latest cell began."""
        self.idle = False
        """Whether what cells have left on the event loop goes on, until the next request comes."""
        self.spoiled = False
        """Whether an interrupt was for a cell that could not begin."""
        self.within = False
        """Whether a cell runs within a cell."""
        self.starting = False
        """Whether it is us who import IPython, just now."""
        self.number = 0
        self.inputs = [""]
        """The source of each cell, as IPython's `In` has it."""
        self.cut = False
        self.shown = 0
        """Bytes of outputs of this cell."""
        self.count = 0
        self.line = line
        self.loops: Any = None
        """The event loop, once asyncio is there."""
        self.around: Any = None
        """Who wants to hear of a cell's begin and end, and of its failure."""
        self.rewriters: Sequence[Any] = ()
        self.transformers: Sequence[Any] = ()
        """What extensions of IPython want done to the source of every cell, and to its tree."""
        self.context = copy_context()
        """Context variables that a cell sets are there in the next."""
        self._tracing: tuple[Any, Any] = (None, None)
        self._me = getpid()

    def begin(self, source: str) -> None:
        """What holds at the begin of every cell, whatever the one before it did."""
        self.number += 1
        self.inputs.append(source)
        self.cut, self.shown, self.count, self.interrupts = False, 0, 0, 0
        self.names["__builtins__"] = builtins
        modules = sys.modules
        modules["builtins"], modules["sys"], modules["__main__"] = builtins, sys, self.module
        self.names.pop("__warningregistry__", None)
        if _signal.getsignal(_signal.SIGINT) is not self.interrupted:
            _signal.signal(_signal.SIGINT, self.interrupted)

    def trace_again(self) -> None:
        """With what an earlier cell has set; our own work is not for its eyes."""
        if self._tracing != (None, None):
            setprofile(self._tracing[1])
            settrace(self._tracing[0])

    def calm(self) -> None:
        """The cell has ended: its tracer does not look at what we do, and its limit of recursion leaves room for that."""
        trace, profile = self._tracing = gettrace(), getprofile()
        if trace is not None or profile is not None:
            settrace(None)
            setprofile(None)
        if getrecursionlimit() < RECURSION_MIN:
            setrecursionlimit(RECURSION_MIN)

    def interrupted(self, signum: int, frame: object) -> None:
        self.interrupts += 1
        if self.running:
            raise KeyboardInterrupt
        if self.idle and self.line.waiting():
            self.spoiled = True
            raise KeyboardInterrupt

    def show(self, value: object) -> None:
        """A last expression's value: as text, like the interactive interpreter, and in its richer forms."""
        hook = getattr(sys, "displayhook", sys.__displayhook__)
        if type(value) in PLAIN or value is None or hook is not sys.__displayhook__:
            hook(value)
        elif type(value) is Leave:
            value()
        else:
            self.part("outputs").of(self).show(value)

    def run_within(self, source: str) -> None:
        """A cell within a cell; raises what it raises."""
        within, self.within = self.within, True
        try:
            Cell(self.number, source, ", inner").run(self)
            if "matplotlib.pyplot" in sys.modules:
                self.part("outputs").of(self).figures()
        finally:
            self.within = within

    def send(self, payload: bytes) -> None:
        """One output, as JSON. A fork of the worker has no line of its own to the agent: it stays silent."""
        if getpid() == self._me:
            self.streams.flush()
            self.line.send(OUTPUT.pack(SHOWN, len(payload)) + payload)

    def tell(self, exc: BaseException) -> None:
        """Write an exception as Python would, without the frames that are not the user's."""
        self.streams.say(told(exc))

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
        del self.inputs[1:]


class Cell:
    """One piece of code with a name under which tracebacks find its source."""

    def __init__(self, number: int, source: str, inner: str = "") -> None:
        if source[:1] == "\ufeff":  # of an editor's that begins files with it
            source = source[1:]
        self.name = f"<cell {number}{inner}>"
        self.source = source
        if type(linecache.cache) is not dict:
            linecache.cache = {}
        linecache.cache[self.name] = (len(source), None, source.splitlines(True), self.name)

    def run(self, space: Space) -> None:
        """Execute as one piece; a last expression's value is shown as the interactive interpreter shows it."""
        if "\n" not in self.source and not space.transformers and not space.rewriters:
            try:  # most one-liners are an expression, and that is the shorter way
                whole = self._compiled(self.source, "eval")
            except (SyntaxError, ValueError):
                pass
            else:
                self._evaluate(whole, space, space.show)
                return
        tree, source = self._parsed(space)
        names = space.names
        if not _last_is_kept(tree, source):
            self._evaluate(self._compiled(tree, "exec"), space, None)
            return
        try:
            self._evaluate(self._compiled(tree, "exec"), space, lambda _: space.show(names.pop(LAST)))
        finally:
            names.pop(LAST, None)

    def _parsed(self, space: Space) -> Any:
        """The cell as a tree, and the plain Python that this is the tree of."""
        source = self.source
        try:
            if space.rewriters:
                source = space.part("notebook").of(space).rewritten(source)
            tree = self._compiled(source, "exec", ast.PyCF_ONLY_AST)
        except SyntaxError:
            plain = space.part("notebook").of(space).translated(self.source)
            if plain is None:
                raise
            source = plain
            tree = self._compiled(source, "exec", ast.PyCF_ONLY_AST)
        if space.transformers:
            tree = space.part("notebook").of(space).transformed(tree)
        return tree, source

    def _compiled(self, source: Any, mode: str, flags: int = 0) -> Any:
        return compile(source, self.name, mode, flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)

    def _evaluate(self, code: Any, space: Space, then: Callable[[Any], None] | None) -> None:
        context = copy_context() if space.within else space.context  # one that has been entered can't be entered again
        value = context.run(eval, code, space.names)
        if code.co_flags & CO_COROUTINE:
            space.part("loops").of(space).run(value, then, context)
        elif then is not None:
            context.run(then, value)


def _last_is_kept(tree: Any, source: str) -> bool:
    """Have a last expression leave its value under LAST; False when there is none, or a `;` behind it."""
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr):
        return False
    if ";" in source and QUIET.match(_behind(last.value, source)):
        return False
    place: Any = {name: getattr(last, name) for name in ("lineno", "col_offset", "end_lineno", "end_col_offset")}
    tree.body[-1] = ast.Assign([ast.Name(LAST, ast.Store(), **place)], last.value, **place)
    return True


def _behind(expression: Any, source: str) -> str:
    """What stands in `source` behind an expression of it."""
    lines = source.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "surrogatepass").split(b"\n")
    lines = lines[expression.end_lineno - 1 :]
    return b"\n".join((lines[0][expression.end_col_offset :], *lines[1:])).decode("utf-8", "replace")


class Leave:
    """What `exit` and `quit` are: they end the cell."""

    def __call__(self, code: object = None) -> None:
        raise SystemExit(code)

    def __repr__(self) -> str:
        return "Use exit() to end the cell"


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
        close(fd)
    return high


def told(exc: BaseException) -> str:
    """An exception as Python would write it, without the frames that are not the user's."""
    with suppress(Exception):  # a cell may have replaced what this needs, or the exception fails when it is looked at
        return _written(exc)
    standing = dict(builtins.__dict__)
    builtins.__dict__.update(globals()["__builtins__"])
    try:
        return _written(exc)
    except Exception:
        return _named(exc)
    finally:
        builtins.__dict__.update(standing)


def _written(exc: BaseException) -> str:
    whole = TracebackException(type(exc), exc, exc.__traceback__)
    _without_ours(whole)
    return "".join(whole.format())


def _named(exc: BaseException) -> str:
    try:
        return f"{type(exc).__name__}: {exc}\n"
    except Exception:
        return type(exc).__name__ + "\n"


def _without_ours(whole: Any) -> None:
    waiting, seen = [whole], set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        first = next((n for n, frame in enumerate(one.stack) if frame.filename.startswith("<cell ")), None)
        if first is None:
            one.stack[:] = [frame for frame in one.stack if not frame.filename.startswith(OURS)]
        else:
            one.stack[:] = [frame for frame in one.stack[first:] if not _hidden(frame.filename)]
        waiting += (one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ()))


def _hidden(filename: str) -> bool:
    return filename.startswith(OURS) or "/IPython/" in filename


def run(source: str, space: Space) -> int:
    """The exit code of a cell: 0, 1 after an exception, or what sys.exit() was given."""
    try:
        cell = Cell(space.number, source)
        space.trace_again()
        cell.run(space)
        return 0
    except BaseException as exc:
        space.calm()
        if space.around is not None:
            space.around.failed(exc)
        if isinstance(exc, SystemExit):
            if exc.code is None or isinstance(exc.code, int):
                code = exc.code or 0
                return code & 0xFF if abs(code) < 1 << 63 else 0xFF  # as Python itself ends
            space.streams.say(f"{exc.code}\n")
            return 1
        space.tell(exc)
        return 130 if isinstance(exc, KeyboardInterrupt) else 1


def finished(source: str, space: Space) -> int:
    """Run a cell, and show the figures that it left open. An interrupt may come at any moment of this."""
    try:
        space.running = True
        if space.around is not None:
            space.around.before(source)
        code = run(source, space)
        if "matplotlib.pyplot" in sys.modules:
            space.part("outputs").of(space).figures()
        if space.around is not None:
            space.around.after()
        space.streams.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except (
        BaseException
    ) as exc:  # a stand-in of the user's, memory that is gone: the exit code may have to tell it alone
        space.running = False
        space.tell(exc)
        return 1
    finally:
        space.running = False


def perform(source: str, space: Space, meter: Meter) -> int:
    """One cell from its code to its answer; the exit code. Never raises."""
    exit_code = 1
    try:
        space.streams.mend()
        space.begin(source)
        meter.start()
        exit_code = finished(source, space)
    except BaseException as exc:  # raised by the handler of a signal, where it was nobody's turn
        space.streams.say(told(exc))
    for step in (space.calm, space.streams.flush_own, meter.stop):
        with suppress(BaseException):  # raised by the handler of a signal, where it was nobody's turn
            step()
    if getpid() != meter.me:
        _exit(exit_code)  # a fork that ran off the end of the cell
    flags = CUT if space.cut else 0
    space.line.send(ANSWER.pack(ANSWERED, flags, exit_code, meter.wall_s, meter.cpu_s, meter.peak_kib))
    meter.renew()
    space.streams.renew()
    return exit_code


class Meter:
    """What a cell takes: wall clock, CPU with the children that were waited for, and the peak of resident memory."""

    def __init__(self) -> None:
        self.me = getpid()
        self.wall_s = self.cpu_s = 0.0
        self.peak_kib = 0
        self._children = getrusage(RUSAGE_CHILDREN)
        try:
            self._refs = moved_up(os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC))
        except OSError:
            self._refs = -1
        self._wall = self._cpu = 0.0
        self.renew()

    def renew(self) -> None:
        """The peak starts anew; when a cell comes it may be waited for already. proc(5), clear_refs"""
        if self._refs >= 0:
            try:
                write(self._refs, b"5")
            except OSError:
                self._refs = -1

    def start(self) -> None:
        if _thread._count() > 1:  # else nobody can have waited for a child since the last cell
            self._children = getrusage(RUSAGE_CHILDREN)
        self._wall, self._cpu = perf_counter(), process_time()

    def stop(self) -> None:
        self.wall_s = perf_counter() - self._wall
        own, children = getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)
        before, self._children = self._children, children
        cpu = own.ru_utime + own.ru_stime - self._cpu
        cpu += children.ru_utime + children.ru_stime - before.ru_utime - before.ru_stime
        self.cpu_s = max(0.0, cpu)
        self.peak_kib = max(own.ru_maxrss, children.ru_maxrss if children.ru_maxrss > before.ru_maxrss else 0)


class Streams:
    """stdin, stdout and stderr. Each cell begins with ones that lead to its result, whatever the one before did to them."""

    NAMES = ("stdin", "stdout", "stderr")

    def __init__(self) -> None:
        self._spare = tuple(moved_up(number, copy=True) for number in (0, 1, 2))
        self.stdin: Any = sys.stdin
        asked = "PYTHONIOENCODING" in os.environ
        self.encoding: str = sys.stdout.encoding
        self.errors: str = (asked and sys.stdout.errors) or "backslashreplace"
        self.stdout, self.stderr = self._on(1), self._on(2)
        sys.stdout = sys.__stdout__ = self.stdout  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = self.stderr  # type: ignore[misc]

    def listen(self, pulse: int) -> None:
        """The agent writes a byte now and then while a cell runs: what was printed without a newline goes out then."""
        pulse = moved_up(pulse)
        self.quiet()
        _thread.start_new_thread(self._flush_on, (pulse,))

    @staticmethod
    def quiet() -> None:
        """That thread is no reason to warn of a fork."""
        warnings.filterwarnings("ignore", r".*multi-threaded, use of (os\.)?fork", DeprecationWarning)

    def mend(self) -> None:
        """Open again what is closed, put back what is gone. What a cell has put in the place of a stream stays there."""
        try:
            if (
                sys.stdout is self.stdout
                and sys.stderr is self.stderr
                and sys.stdin is self.stdin
                and not (self.stdout.closed or self.stderr.closed or self.stdin.closed)
            ):
                return
        except (AttributeError, ValueError):
            pass  # one is deleted, or its parts were taken from it
        for number, name in enumerate(self.NAMES):
            own = getattr(self, name)
            if own is None or _closed(own):
                fresh = open(0, encoding=self.encoding, closefd=False) if number == 0 else self._on(number)
                setattr(self, name, fresh)
                setattr(sys, "__" + name + "__", fresh)
            standing = getattr(sys, name, None)
            if standing is None or standing is own or _closed(standing):
                setattr(sys, name, getattr(self, name))

    def _on(self, number: int) -> io.TextIOWrapper:
        stream = stream_on(number, self.encoding, self.errors if number == 1 else "backslashreplace")
        stream.buffer.raw.name = "<" + self.NAMES[number] + ">"  # type: ignore[attr-defined]
        return stream

    def renew(self) -> None:
        """Descriptors 0, 1 and 2 are what they were in the beginning."""
        for number, spare in enumerate(self._spare):
            try:
                dup2(spare, number)
            except OSError:
                continue  # a cell has closed the spare one too

    def flush(self) -> None:
        """Also what a cell has put in their place, which may raise anything."""
        for standing in (getattr(sys, "stdout", None), getattr(sys, "stderr", None)):
            if standing is not self.stdout and standing is not self.stderr:
                with suppress(Exception):
                    standing.flush()  # type: ignore[union-attr]
        self.flush_own()

    def flush_own(self) -> None:
        for stream in (self.stdout, self.stderr):
            try:
                stream.flush()
            except ValueError:
                continue  # closed
            except OSError:
                self.renew()  # the cell has closed the descriptor below it
                try:
                    stream.flush()
                except (OSError, ValueError):
                    continue

    def say(self, text: str) -> None:
        """On stderr as it is in the result, whatever stands in its place."""
        self.flush()
        try:
            self.stderr.write(text)
            self.stderr.flush()
        except (OSError, ValueError):
            write(self._spare[2], text.encode("utf-8", "backslashreplace"))

    def _flush_on(self, pulse: int) -> None:
        while True:
            try:
                if not read(pulse, 4096):
                    return
            except OSError:
                return
            for stream in (self.stdout, self.stderr):
                with suppress(Exception):  # closed by the cell
                    stream.flush()


def _closed(stream: Any) -> bool:
    try:
        return stream.closed is True
    except ValueError:
        return isinstance(stream, io.TextIOWrapper)  # its parts were taken from it
    except Exception:
        return False  # something of the user's that only writes


def stream_on(fd: int, encoding: str = "utf-8", errors: str = "backslashreplace") -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
    stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=True)
    stream.mode = "w"  # type: ignore[misc]
    return stream


def no_input(prompt: object = "") -> str:
    """Stands in for input()."""
    raise EOFError("input() can't be answered: nobody is at the keyboard of a sandbox. Set a variable instead.")


def no_breakpoint(*values: object, **options: object) -> object:
    """Stands in for what breakpoint() calls, unless PYTHONBREAKPOINT says what it is to call."""
    if os.environ.get("PYTHONBREAKPOINT"):
        return sys.__breakpointhook__(*values, **options)
    raise EOFError("breakpoint() can't stop here: nobody is at the keyboard of a sandbox. Print what you want to see.")


def main(sources: dict[str, str]) -> None:
    line = Line(LINE_FD)
    streams = Streams()
    space = Space(line, Parts(sources), streams)
    sys.modules["__main__"] = space.module
    sys.argv = [""]
    if sys.path[:1] != [""]:
        sys.path.insert(0, "")
    sys.meta_path.insert(0, Watch(_after(space)))
    builtins.input = no_input
    sys.breakpointhook = no_breakpoint
    setattr(builtins, "display", lambda *values, **options: _display(space, values, options))  # noqa: B010
    setattr(builtins, "exit", Leave())  # noqa: B010
    setattr(builtins, "quit", builtins.exit)  # noqa: B010
    streams.listen(PULSE_FD)
    meter = Meter()
    _signal.signal(_signal.SIGINT, space.interrupted)
    while True:
        try:
            if not serve(line, space, meter):
                _exit(0)
        except BaseException as exc:  # raised by the handler of a signal, between two cells
            streams.say(told(exc))


def serve(line: Line, space: Space, meter: Meter) -> bool:
    """What the agent asks next. False: it has gone."""
    if space.loops is not None and space.loops.busy():
        space.loops.idle()
    ask = line.receive()
    if ask is None:
        return False
    flags, code, env = ask
    if flags & REHEARSE:
        space.clean()
        rehearse(line, meter, space)
        return True
    if flags & ENOUGH:
        return True
    if flags & AWAIT:
        space.await_interrupt()
    elif space.spoiled:
        code = "raise KeyboardInterrupt('what an earlier cell has left running did not let this one begin')"
    space.spoiled = False
    if flags & FRESH:
        reseed()
    if env:
        os.environ.update(env)
        if any(name.startswith(SETTINGS) for name in env):
            space.part("environment").apply(env, space.streams)
    perform(code, space, meter)
    return True


def _after(space: Space) -> dict[str, Callable[[], None]]:
    def pyplot() -> None:
        space.part("outputs").of(space).take_pyplot()

    def ipython() -> None:
        if not space.starting:
            space.part("notebook").of(space)

    def asyncio() -> None:
        space.part("loops").of(space).take()

    def getpass() -> None:
        module: Any = sys.modules["getpass"]
        module.getpass = module.unix_getpass = no_input

    return {"matplotlib.pyplot": pyplot, "IPython": ipython, "asyncio": asyncio, "getpass": getpass}


def _display(space: Space, values: Sequence[object], options: dict[str, Any]) -> object:
    """Stands in for display() of a notebook."""
    if not options and space.part("outputs").capturing(space) is None and all(type(value) in PLAIN for value in values):
        for value in values:
            print(value if type(value) is str else repr(value))
        return None
    return space.part("outputs").of(space).display(values, options)


_PROPS: list[object] = []
"""What a rehearsal stood on. Never closed: that would be the first thing a clone does, just when its first cell comes."""


def rehearse(line: Line, meter: Meter, own: Space) -> None:
    """Go through the motions of a cell, into the void and a namespace of its own, until a request is there.

    A template is saved while this runs. So a clone's interpreter goes on with it from the first moment, beside the agent
    that gets its identity, and by the time that the user's code comes an emulator has translated what it needs.
    """
    here, there = socket.socketpair()
    mirror, echo = Line(here.detach()), Line(there.detach())
    void = stream_on(moved_up(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)))
    _PROPS.append((mirror, echo, void))
    streams = own.streams
    kept, streams.stdout = streams.stdout, void
    sys.stdout = void
    space = Space(mirror, own.part, streams)
    try:
        while not line.waiting():
            code = "print(1)"
            echo.send(ASK.pack(0, len(code), 0) + code.encode())
            mirror.receive()
            reseed()
            space.number = -1
            perform(code, space, meter)
            space.inputs.clear()
            echo.discard(ANSWER.size)
    finally:
        sys.stdout = streams.stdout = kept


if __name__ == "__main__":
    main(globals()["SOURCES"])
