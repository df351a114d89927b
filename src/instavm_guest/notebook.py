"""What notebooks know and Python does not: `!command`, `%magic`, `%%bash`, `name?`. Runs in the image's Python, see worker.py.

Where IPython is there, its transformers and its magics do it, on the user's namespace; where it is not, the few that
everybody uses are here. A cell comes here only after Python has refused it as a syntax error.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

PIP = re.compile(
    r"^([ \t]*)(pip3?[ \t]+(?:install|uninstall|list|show|freeze|download|check|config|index|wheel|-\S+)\b)", re.M
)
MARKS = re.compile(r"[%!?]")
SIMPLE = re.compile(r"^(?P<indent>\s*)(?P<name>[A-Za-z_][\w.]*\s*=\s*)?(?P<mark>!|%)(?P<rest>[^\n=].*)$")
SHELL = "/bin/bash"
ARGUMENT_MAX = 100 << 10
"""Longest script that goes as an argument; the kernel's own limit is 128 KiB (MAX_ARG_STRLEN)."""
NAMING = ("--out", "--err", "--proc")
FLAGS = {"--bg": ("bg", True), "--no-raise-error": ("raise", False), "--raise-error": ("raise", True)}
SCRIPTS = ("sh", "bash", "perl", "ruby", "python", "python2", "python3", "pypy")
TAKES_MORE = re.compile(r"[-+][A-Za-z]*[oO]")
"""An option of a shell with a word behind it, as `-o pipefail`."""


def flush() -> None:
    """What was printed goes out before a program writes to the same place. A cell may have put anything in the streams' place."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def shell(command: str) -> int:
    """Run `command` on the cell's own stdout and stderr; its exit code, negative when a signal ended it."""
    flush()
    return subprocess.call(command, shell=True, executable=SHELL if os.path.exists(SHELL) else None)  # noqa: S602


def lines_of(command: str) -> list[str]:
    """What `command` prints on stdout, as lines."""
    flush()
    program = SHELL if os.path.exists(SHELL) else None
    done = subprocess.run(command, shell=True, executable=program, stdout=subprocess.PIPE, check=False)  # noqa: S602
    return done.stdout.decode(errors="replace").splitlines()


class Scripts:
    """`%%script program`, and `%%bash` and the like: a cell that a program runs. Options as IPython's."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names
        self._jobs: list[Any] = []

    def magic(self, program: str) -> Callable[[str, str], None]:
        return lambda line, cell: self.run(f"{program} {line}", cell)

    def run(self, line: str, cell: str) -> None:
        """Raises ValueError for an option that is not there, CalledProcessError when the program fails."""
        options, argv = _options(shlex.split(line))
        if not argv:
            raise ValueError("%%script needs the name of a program, as in `%%script bash`")
        flush()
        streams: Any = {
            stream: subprocess.PIPE for stream, name in (("stdout", "out"), ("stderr", "err")) if name in options
        }
        argv, given = _with_script(argv, cell if cell.endswith("\n") else cell + "\n")
        try:
            process: Any = subprocess.Popen(argv, stdin=given, **streams)
        finally:
            if given != subprocess.DEVNULL:
                os.close(given)
        if options.get("bg"):
            self._jobs.append(process)
            self._keep(options, process.stdout, process.stderr, process)
            return
        with process:
            try:
                out, err = (None if data is None else data.decode(errors="replace") for data in process.communicate())
            except BaseException:
                process.kill()
                raise
        self._keep(options, out, err, process)
        if process.returncode and options.get("raise", True):
            raise subprocess.CalledProcessError(process.returncode, argv[0], out, err)

    def kill(self, line: str = "") -> None:
        """End what runs in the background."""
        for process in self._jobs:
            process.kill()
            process.wait()
        self._jobs.clear()

    def _keep(self, options: dict[str, Any], out: Any, err: Any, process: Any) -> None:
        for option, value in (("out", out), ("err", err), ("proc", process)):
            if option in options:
                self._names[options[option]] = value


def _options(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What is ours of the words behind `%%script`, and what is the program's."""
    options: dict[str, Any] = {}
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name in NAMING:
            if not equals and not waiting:
                raise ValueError(f"{name} needs the name of a variable")
            options[name[2:]] = value if equals else waiting.pop(0)
            if not options[name[2:]].isidentifier():
                raise ValueError(f"{name} {options[name[2:]]!r} is no name of a variable")
        elif word in FLAGS:
            key, flag = FLAGS[word]
            options[key] = flag
        else:
            rest.append(word)
    return options, rest


def _with_script(argv: list[str], cell: str) -> tuple[list[str], int]:
    """The command that runs `cell`, and its stdin. A shell gets it as an argument, so that its commands can't read it away."""
    program, *words = argv
    if os.path.basename(program) in ("bash", "sh") and len(cell.encode(errors="replace")) <= ARGUMENT_MAX:
        count = 0
        while count < len(words) and words[count][:1] in ("-", "+") and words[count] not in ("-", "--"):
            count += 2 if TAKES_MORE.fullmatch(words[count]) else 1
        options = [word for word in words[:count] if word != "-s"]
        return [program, *options, "-c", cell, program, *words[count:]], subprocess.DEVNULL
    script = os.memfd_create("cell", os.MFD_CLOEXEC)
    with open(os.dup(script), "w", encoding="utf-8", errors="replace") as file:
        file.write(cell)
    os.lseek(script, 0, os.SEEK_SET)
    return argv, script


def pip(line: str) -> None:
    """Install into this very interpreter; what was installed can be imported at once."""
    code = shell(" ".join([shlex.quote(sys.executable), "-m pip", line]))
    importlib.invalidate_caches()
    if code:
        raise subprocess.CalledProcessError(code, "pip " + line)


class Plain:
    """Notebook syntax without IPython: `!`, `x = !`, %pip, %cd, %env, %time, %%bash, %%script …, %%writefile, %%time."""

    interactive = None

    def __init__(self, space: Any, why: Exception) -> None:
        absent = importlib.util.find_spec("IPython") is None
        self._why = "which this image's Python does not have" if absent else f"which does not start here: {why!r}"
        self._names = space.names
        scripts = Scripts(space.names)
        self._names["get_ipython"] = lambda: self
        space.own.add("get_ipython")
        self._lines: dict[str, Callable[[str], object]] = {
            "pip": pip,
            "cd": self._cd,
            "env": self._env,
            "time": self._timed,
            "pwd": lambda line: os.getcwd(),
            "killbgscripts": scripts.kill,
        }
        self._cells: dict[str, Callable[[str, str], object]] = {
            **{program: scripts.magic(program) for program in SCRIPTS},
            "script": scripts.run,
            "writefile": self._write,
            "time": lambda line, cell: self._timed(cell),
        }

    def translated(self, source: str) -> str | None:
        source = PIP.sub(r"\1%\2", source)
        if not MARKS.search(source):
            return None
        body = source.lstrip()
        if body.startswith("%%"):
            head, _, rest = body.partition("\n")
            name, _, line = head[2:].partition(" ")
            return f"get_ipython().run_cell_magic({name!r}, {line.strip()!r}, {rest!r})\n"
        plain = "\n".join(self._line(line) for line in source.split("\n"))
        return None if plain == source else plain

    def _line(self, line: str) -> str:
        found = SIMPLE.match(line)
        if found is None:
            return line
        before, rest = found["indent"] + (found["name"] or ""), found["rest"].strip()
        if found["mark"] == "!":
            return f"{before}get_ipython().{'getoutput' if found['name'] else 'system'}({rest!r})"
        name, _, more = rest.partition(" ")
        return f"{before}get_ipython().run_line_magic({name!r}, {more.strip()!r})"

    def system(self, command: str) -> None:
        self._names["_exit_code"] = shell(command)

    def getoutput(self, command: str) -> list[str]:
        return lines_of(command)

    def run_line_magic(self, name: str, line: str) -> object:
        return self._known(self._lines, "%" + name, name)(line)

    def run_cell_magic(self, name: str, line: str, cell: str) -> object:
        return self._known(self._cells, "%%" + name, name)(line, cell)

    def _known(self, magics: dict[str, Any], shown: str, name: str) -> Any:
        if name not in magics:
            raise RuntimeError(f"{shown} needs IPython, {self._why}")
        return magics[name]

    def _cd(self, line: str) -> None:
        os.chdir(os.path.expanduser(line.strip() or "~"))
        print(os.getcwd())

    def _env(self, line: str) -> object:
        name, equals, value = line.partition("=")
        if equals:
            os.environ[name.strip()] = value.strip()
            return None
        return os.environ[name.strip()] if name.strip() else dict(os.environ)

    def _write(self, line: str, cell: str) -> None:
        with open(line.strip(), "w", encoding="utf-8") as file:
            file.write(cell)
        print("Writing " + line.strip())

    def _timed(self, code: str) -> object:
        try:
            whole = compile(code.strip(), "<cell magic>", "eval", dont_inherit=True)
        except SyntaxError:
            whole = compile(code, "<cell magic>", "exec", dont_inherit=True)
        began, spent = time.perf_counter(), time.process_time()
        value: object = eval(whole, self._names)
        print(f"CPU times: {time.process_time() - spent:.3g} s")
        print(f"Wall time: {time.perf_counter() - began:.3g} s")
        return value


def of(space: Any) -> Any:
    """The notebook syntax of `space`, made by the first who asks: IPython's, or `Plain`."""
    found = space.__dict__.get("notebook")
    if found is None:
        space.starting = True
        try:
            found = space.part("interactive").start(space)
        except Exception as exc:  # not installed, or broken: cells without its syntax must run all the same
            found = Plain(space, exc)
        finally:
            space.starting = False
        space.notebook = found
    return found
