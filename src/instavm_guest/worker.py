"""The interpreter whose state persists: runs cells of Python in the image's own Python (3.8 or newer), one at a time.

It is read into that Python as text (`python3 -c`, source on a descriptor), so it imports nothing of ours. The agent sends
flags and two lengths (ASK), then the cell's code and its environment as JSON; the answer is exit code, wall and CPU seconds
(ANSWER). Structs and not JSON, because this is the path that every start of a sandbox takes for the first time.
"""

from __future__ import annotations

import ast
import fcntl
import io
import json
import linecache
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
import types
from typing import Any

LINE_FD = 3
HIGH_FD = 700
ASK = struct.Struct("!BII")
ANSWER = struct.Struct("!idd")
FRESH = 1  # first cell in a new sandbox: generators must not go on where the template's were
REHEARSE = 2  # no cell; go through the motions of one, again and again, until the next request comes


class Line:
    """The socket to the agent, kept out of the way of user code that closes descriptors it did not open."""

    def __init__(self, fd: int) -> None:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
        os.close(fd)
        self._socket = socket.socket(fileno=high)

    def receive(self) -> tuple[int, str, dict[str, str]] | None:
        """The next request as (flags, code, environment), or None when the agent is gone."""
        head = self._exactly(ASK.size)
        if not head:
            return None
        flags, code_size, env_size = ASK.unpack(head)
        code = self._exactly(code_size).decode("utf-8", "surrogatepass") if code_size else ""
        return flags, code, json.loads(self._exactly(env_size)) if env_size else {}

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def discard(self, size: int) -> None:
        self._socket.recv(size)

    def close(self) -> None:
        self._socket.close()

    def waiting(self) -> bool:
        """Whether a request is there to be read."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def _exactly(self, size: int) -> bytes:
        data = self._socket.recv(size)
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            if not more:
                return b""
            data += more
        return data


def reseed() -> None:
    """Every generator that may already be loaded starts again from the kernel's, which has been reseeded before."""
    modules = sys.modules
    if "random" in modules:
        modules["random"].seed()
    if "numpy.random" in modules:
        modules["numpy.random"].seed()


class Cell:
    """One piece of code with a name under which tracebacks find its source."""

    def __init__(self, number: int, source: str) -> None:
        self.name = f"<cell {number}>"
        self.source = source
        linecache.cache[self.name] = (len(source), None, source.splitlines(True), self.name)

    def run(self, space: dict[str, Any]) -> None:
        """Execute; a last expression's value is shown as the interactive interpreter shows it."""
        if "\n" not in self.source:  # most one-liners are an expression, and that is the shorter way
            try:
                whole = compile(self.source, self.name, "eval")
            except SyntaxError:
                pass
            else:
                sys.displayhook(eval(whole, space))
                return
        tree = ast.parse(self.source, self.name)
        last = tree.body[-1] if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
        if tree.body:
            exec(compile(tree, self.name, "exec"), space)
        if isinstance(last, ast.Expr):
            sys.displayhook(eval(compile(ast.Expression(last.value), self.name, "eval"), space))


def report() -> None:
    """Write the current exception as Python would, without the frames of this file."""
    kind, value, trace = sys.exc_info()
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    traceback.print_exception(kind, value, trace)


def run(cell: Cell, space: dict[str, Any]) -> int:
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


def flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            continue  # the user's code closed or replaced it


def main() -> None:
    line = Line(LINE_FD)
    me = os.getpid()
    main_module = types.ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main_module
    sys.argv = [""]
    sys.path.insert(0, "")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    number = 0
    while True:
        try:
            ask = line.receive()
        except KeyboardInterrupt:
            continue  # an interrupt that came after its cell had ended
        if ask is None:
            os._exit(0)
        flags, code, env = ask
        if flags & REHEARSE:
            rehearse(line)
            continue
        if flags & FRESH:
            reseed()
        if env:
            os.environ.update(env)
        number += 1
        wall, cpu = time.perf_counter(), time.process_time()
        exit_code = run(Cell(number, code), main_module.__dict__)
        flush()
        if os.getpid() != me:
            os._exit(exit_code)  # a fork that ran off the end of the cell
        line.send(ANSWER.pack(exit_code, time.perf_counter() - wall, time.process_time() - cpu))


def rehearse(line: Line) -> None:
    """Go through the motions of a cell, into the void and a namespace of its own, until a request is there.

    A template is saved while this runs. So a clone's interpreter goes on with it from the first moment, beside the agent
    that gets its identity, and by the time that the user's code comes an emulator has translated what it needs.
    """
    here, there = socket.socketpair()
    mirror, echo = Line(here.detach()), Line(there.detach())
    kept, sys.stdout = sys.stdout, open(os.devnull, "w", buffering=1)
    try:
        while not line.waiting():
            code = "print(1)"
            echo.send(ASK.pack(0, len(code), 0) + code.encode())
            mirror.receive()
            reseed()
            run(Cell(0, code), {"__builtins__": __builtins__})
            sys.stdout.flush()
            mirror.send(ANSWER.pack(0, time.perf_counter(), time.process_time()))
            echo.discard(ANSWER.size)
    finally:
        sys.stdout.close()
        sys.stdout = kept
        mirror.close()
        echo.close()


if __name__ == "__main__":
    main()
