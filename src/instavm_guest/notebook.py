"""What notebooks know and Python does not: `!command`, `%magic`, `%%bash`, `name?`. Runs in the image's Python, see worker.py.

Where IPython is there, its transformers and its magics do it, on the user's namespace; where it is not, the few that
everybody uses are here. A cell comes here only after Python has refused it as a syntax error.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PIP = re.compile(
    r"^([ \t]*)(pip3?[ \t]+(?:install|uninstall|list|show|freeze|download|check|config|index|wheel|-\S+)\b)", re.M
)
MARKS = re.compile(r"[%!?]")
SIMPLE = re.compile(r"^(?P<indent>\s*)(?P<name>[A-Za-z_][\w.]*\s*=\s*)?(?P<mark>!|%)(?P<rest>[^\n=].*)$")
SHELL = "/bin/bash"
EMBED = "IPython.terminal.embed"


def shell(command: str) -> int:
    """Run `command` on the cell's own stdout and stderr; its exit code, negative when a signal ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    return subprocess.call(command, shell=True, executable=SHELL if os.path.exists(SHELL) else None)  # noqa: S602


def lines_of(command: str) -> list[str]:
    """What `command` prints on stdout, as lines."""
    sys.stdout.flush()
    program = SHELL if os.path.exists(SHELL) else None
    done = subprocess.run(command, shell=True, executable=program, stdout=subprocess.PIPE, check=False)  # noqa: S602
    return done.stdout.decode(errors="replace").splitlines()


def script(program: str) -> Callable[[str, str], None]:
    """A cell magic that hands the cell to `program`."""

    def run(line: str, cell: str) -> None:
        sys.stdout.flush()
        subprocess.run([program, "-c", cell, program, *shlex.split(line)], check=True)

    return run


def pip(line: str) -> None:
    """Install into this very interpreter; what was installed can be imported at once."""
    code = shell(" ".join([shlex.quote(sys.executable), "-m pip", line]))
    importlib.invalidate_caches()
    if code:
        raise subprocess.CalledProcessError(code, "pip " + line)


class Notebook:
    """Notebook syntax with IPython."""

    def __init__(self, space: Any, interactive: Any) -> None:
        self._shell = interactive
        interactive.system = self._system
        interactive.display_formatter.format = lambda value, include=None, exclude=None: (_bundle(value), {})
        interactive.display_pub.publish = lambda data, *_, **__: _publish(space, data)
        interactive.register_magic_function(pip, "line", "pip")
        for program in ("bash", "sh"):
            interactive.register_magic_function(script(program), "cell", program)

    def translated(self, source: str) -> str | None:
        """`source` as plain Python; None when nothing in it is notebook syntax."""
        source = PIP.sub(r"\1%\2", source)
        plain: str = self._shell.transform_cell(source)
        return None if plain.rstrip() == source.rstrip() else plain

    def _system(self, command: str) -> None:
        self._shell.user_ns["_exit_code"] = shell(self._shell.var_expand(command, depth=1))


class Plain:
    """Notebook syntax without IPython: `!`, `x = !`, %pip, %cd, %env, %time, %%bash, %%sh, %%writefile, %%time."""

    def __init__(self, space: Any) -> None:
        self._names = space.names
        self._names["get_ipython"] = lambda: self
        space.own.add("get_ipython")
        self._lines: dict[str, Callable[[str], object]] = {
            "pip": pip,
            "cd": self._cd,
            "env": self._env,
            "time": self._timed,
            "pwd": lambda line: os.getcwd(),
        }
        self._cells: dict[str, Callable[[str, str], object]] = {
            "bash": script("bash"),
            "sh": script("sh"),
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
            raise RuntimeError(f"{shown} needs IPython, which this image's Python does not have")
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

    def _timed(self, code: str) -> None:
        began, spent = time.perf_counter(), time.process_time()
        exec(compile(code, "<cell magic>", "exec", dont_inherit=True), self._names)
        print(f"CPU times: {time.process_time() - spent:.3g} s")
        print(f"Wall time: {time.perf_counter() - began:.3g} s")


def of(space: Any) -> Notebook | Plain:
    """The notebook syntax of `space`, made by the first who asks."""
    found: Notebook | Plain | None = space.__dict__.get("notebook")
    if found is None:
        space.starting = True
        interactive = _ipython(space)
        space.starting = False
        found = space.notebook = Plain(space) if interactive is None else Notebook(space, interactive)
    return found


def _ipython(space: Any) -> Any:
    """IPython's shell on the user's own namespace, or None. It keeps no history: nothing is written for that."""
    before, hook = set(space.names), sys.displayhook
    with _without_a_terminal():
        try:
            from IPython.core.interactiveshell import InteractiveShell  # type: ignore[import-not-found]  # noqa: PLC0415
            from traitlets.config import Config  # type: ignore[import-not-found]  # noqa: PLC0415
        except Exception:  # not installed, or broken: cells without its syntax must run all the same
            return None
        config = Config()
        config.HistoryManager.enabled = False
        config.InteractiveShell.colors = "NoColor"
        made = InteractiveShell.instance(config=config, user_module=space.module)
    sys.displayhook = hook
    space.names.setdefault("get_ipython", made.get_ipython)
    space.own |= set(space.names) - before
    return made


@contextmanager
def _without_a_terminal() -> Iterator[None]:
    """IPython that is imported in here leaves out half of itself: the line editor, which comes when somebody asks for
    `IPython.embed`, and the completer's engine, which no cell needs.
    """
    if "IPython" in sys.modules:
        yield
        return
    stand_in: Any = types.ModuleType(EMBED)
    stand_in.embed = None
    absent = {EMBED: stand_in} if "jedi" in sys.modules else {EMBED: stand_in, "jedi": None}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)
    whole: Any = sys.modules.get("IPython")
    if getattr(whole, "embed", stand_in) is None:
        del whole.embed
        whole.__getattr__ = _embed


def _embed(name: str) -> Any:
    """IPython's `__getattr__`."""
    if name != "embed":
        raise AttributeError("module 'IPython' has no attribute " + repr(name))
    return importlib.import_module(EMBED).embed


def _bundle(value: object) -> dict[str, Any]:
    from instavm_guest import outputs  # noqa: PLC0415

    return outputs.bundle(value)


def _publish(space: Any, data: dict[str, Any]) -> None:
    from instavm_guest import outputs  # noqa: PLC0415

    if "text/plain" in data:
        print(data["text/plain"])
    outputs.of(space).publish(data)
