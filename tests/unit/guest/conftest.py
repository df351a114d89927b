"""The worker of cells alone, under the Python that runs the tests: no machine, no agent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from instavm_guest.interpreter import python
from instavm_guest.programs import memory_file
from instavm_guest.worker import ANSWER, ANSWERED, ASK, CUT, LINE_FD, OUTPUT, PULSE_FD, SOURCE_FD


class Worker:
    """A worker process, and the agent's end of its line."""

    def __init__(self, folder, executable=sys.executable, isolated=False):
        self.folder = folder
        self.line, theirs = socket.socketpair()
        pulse_read, self.pulse = os.pipe()
        source = memory_file(python().source)
        self._out = [(folder / name).open("w+b") for name in ("stdout", "stderr")]
        high = [os.dup(fd) for fd in (theirs.fileno(), source, pulse_read)]

        def arrange():
            for number, fd in zip(
                (LINE_FD, SOURCE_FD, PULSE_FD), [os.dup2(fd, 50 + i) for i, fd in enumerate(high)], strict=True
            ):
                os.dup2(fd, number)

        argv = [executable, *(["-I", "-S"] if isolated else []), *python().programs[0][1:]]
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self._out[0],
            stderr=self._out[1],
            cwd=folder,
            close_fds=False,
            preexec_fn=arrange,
        )
        for fd in (*high, source, pulse_read):
            os.close(fd)
        theirs.close()

    def ask(self, code, flags=0, **env):
        extra = json.dumps(env).encode() if env else b""
        data = code.encode("utf-8", "surrogatepass")
        self.line.sendall(ASK.pack(flags, len(data), len(extra)) + data + extra)

    def answer(self):
        """What became of the cell: exit code, outputs, whether some were cut, and what it printed."""
        outputs = []
        while True:
            kind = self._exactly(1)
            if kind[0] == ANSWERED:
                break
            outputs.append(json.loads(self._exactly(OUTPUT.unpack(kind + self._exactly(OUTPUT.size - 1))[1])))
        _, flags, exit_code, *_ = ANSWER.unpack(kind + self._exactly(ANSWER.size - 1))
        return Answer(exit_code, outputs, bool(flags & CUT), *(self.printed(file) for file in self._out))

    def run(self, code, **env):
        self.ask(code, **env)
        return self.answer()

    def printed(self, file):
        """What came since this was last asked."""
        seen = getattr(self, f"_seen_{file.fileno()}", 0)
        data = os.pread(file.fileno(), 1 << 24, seen)
        setattr(self, f"_seen_{file.fileno()}", seen + len(data))
        return data.decode(errors="replace")

    def _exactly(self, size):
        data = b""
        while len(data) < size:
            more = self.line.recv(size - len(data))
            if not more:
                raise EOFError("the worker ended")
            data += more
        return data

    def close(self):
        self.process.kill()
        self.process.wait()
        self.line.close()
        os.close(self.pulse)
        for file in self._out:
            file.close()


class Answer:
    def __init__(self, exit_code, outputs, cut, stdout, stderr):
        self.exit_code = exit_code
        self.outputs = outputs
        self.cut = cut
        self.stdout = stdout
        self.stderr = stderr


@pytest.fixture
def start_worker(tmp_path):
    """Start workers under any Python; they end with the test."""
    started = []

    def start(executable=sys.executable, **more):
        started.append(Worker(tmp_path, executable, **more))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


@pytest.fixture
def worker(start_worker):
    return start_worker()
