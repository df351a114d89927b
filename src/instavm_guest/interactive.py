"""Notebook syntax with IPython: its shell on the user's own namespace. Runs in the image's Python, see worker.py.

IPython's `InteractiveShell` leaves to a front end how input is asked for, how pages are shown, what a window is, where a failure
goes. Here there is nobody at a keyboard and no screen: each of these works in the way of a result, or is refused with the reason.
"""

from __future__ import annotations

import builtins
import fnmatch
import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LATEST = ("_", "__", "___")
EMBED = "IPython.terminal.embed"
EVENTS = ("pre_execute", "pre_run_cell", "post_execute", "post_run_cell")
ASIDE = ("/IPython/core/events.py", "/IPython/core/formatters.py")
"""Parts of IPython that go on after they have shown a failure."""
FAMILIES = (
    *(
        "Auto",
        "Basic",
        "Async",
        "Code",
        "Config",
        "Display",
        "Execution",
        "Extension",
        "History",
        "Logging",
        "Namespace",
    ),
    *("OS", "Packaging", "Pylab", "Script"),
)
class Notebook:
    """`interactive`: IPython's shell."""

    def __init__(self, space: Any, interactive: Any) -> None:
        self.interactive = interactive
        self._space = space
        self._result: Any = None
        manager = interactive.events
        for name in ("register", "unregister"):
            setattr(manager, name, self._noted(getattr(manager, name)))
        self._follow()

    def translated(self, source: str) -> str | None:
        """`source` as plain Python; None when nothing in it is notebook syntax."""
        self.interactive.execution_count = self._space.number
        plain = self.rewritten(self._space.part("notebook").PIP.sub(r"\1%\2", source))
        return None if plain.rstrip() == source.rstrip() else plain

    def rewritten(self, source: str) -> str:
        plain: str = self.interactive.transform_cell(source)
        return plain

    def transformed(self, tree: Any) -> Any:
        return self.interactive.transform_ast(tree)

    def before(self, source: str) -> None:
        """Tell those who have registered for it that a cell begins."""
        from IPython.core.interactiveshell import (  # type: ignore[import-not-found]  # noqa: PLC0415
            ExecutionInfo,
            ExecutionResult,
        )

        self._result = ExecutionResult(ExecutionInfo(source, True, False, True, None))
        self._result.execution_count = self._space.number
        self.interactive.events.trigger("pre_execute")
        self.interactive.events.trigger("pre_run_cell", self._result.info)

    def failed(self, exc: BaseException) -> None:
        if self._result is not None:
            self._result.error_in_exec = exc

    def after(self) -> None:
        result, self._result = self._result, None
        self.interactive.events.trigger("post_execute")
        if result is not None:
            self.interactive.events.trigger("post_run_cell", result)

    def tail(
        self, n: int = 10, raw: bool = True, output: bool = False, include_latest: bool = False
    ) -> list[tuple[int, int, Any]]:
        """The last `n` cells as a history manager has them: (session, number, source). Without this one, unless asked for."""
        cells = self._cells(output)
        if not include_latest:
            cells.pop()
        return cells[max(0, len(cells) - n) :]

    def search(
        self,
        pattern: str = "*",
        raw: bool = True,
        search_raw: bool = True,
        output: bool = False,
        n: int | None = None,
        unique: bool = False,
    ) -> list[tuple[int, int, Any]]:
        """The cells whose source is as `pattern`, the last `n` of them."""
        sources = self._space.inputs
        found = [cell for cell in self._cells(output) if fnmatch.fnmatchcase(sources[cell[1]], pattern)]
        if unique:
            found = list({sources[cell[1]]: cell for cell in found}.values())
        return found if n is None else found[max(0, len(found) - n) :]

    def _cells(self, output: bool) -> list[tuple[int, int, Any]]:
        cells = list(enumerate(self._space.inputs))[1:]
        return [(0, number, (source, None) if output else source) for number, source in cells]

    def _noted(self, change: Callable[..., Any]) -> Callable[..., None]:
        def changed(event: str, function: Any) -> None:
            change(event, function)
            self._follow()

        return changed

    def _follow(self) -> None:
        """Who wants to take part in every cell; without any of them a plain cell has nothing to do with us."""
        shell, space = self.interactive, self._space
        space.around = self if any(shell.events.callbacks.get(event) for event in EVENTS) else None
        space.transformers = shell.ast_transformers
        space.rewriters = shell.input_transformers_post


def start(space: Any) -> Notebook:
    """IPython on the user's own namespace. It keeps no history on disk. Raises ImportError, and what a broken one raises."""
    named = {name: space.names[name] for name in LATEST if name in space.names}
    before, hook, display = set(space.names), sys.displayhook, builtins.display  # type: ignore[attr-defined]
    with _without_a_terminal():
        from traitlets.config import Config  # type: ignore[import-not-found]  # noqa: PLC0415

        kind = _shell_class(space)
        config = Config()
        config.HistoryManager.enabled = False
        config.InteractiveShell.colors = "NoColor"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "IPython (parent|dir)")  # it needs no place for settings
            made = kind.instance(config=config, user_module=space.module)
    for name in LATEST:  # the latest value is Python's own `_`, in builtins; IPython's stays empty and would hide it
        space.names.pop(name, None)
    space.names.update(named)
    sys.displayhook = hook
    builtins.display = display  # type: ignore[attr-defined]
    made.settle()
    space.names.setdefault("get_ipython", made.get_ipython)
    space.own |= set(space.names) - before
    notebook = Notebook(space, made)
    made.history_manager.get_tail, made.history_manager.search = notebook.tail, notebook.search
    made.observe(lambda _: notebook._follow(), ["ast_transformers", "input_transformers_post"])
    return notebook


def _shell_class(space: Any) -> Any:
    """The shell of a sandbox, which needs IPython to be defined."""
    from IPython.core import magics as classes  # type: ignore[import-not-found]  # noqa: PLC0415
    from IPython.core import page  # noqa: PLC0415
    from IPython.core.displaypub import DisplayPublisher  # type: ignore[import-not-found]  # noqa: PLC0415
    from IPython.core.error import StdinNotImplementedError, UsageError  # type: ignore[import-not-found]  # noqa: PLC0415
    from IPython.core.interactiveshell import ExecutionInfo, ExecutionResult, InteractiveShell  # noqa: PLC0415

    magic = space.part("magics")

    class Publisher(DisplayPublisher):  # type: ignore[misc]
        """Where `IPython.display.display` leads."""

        def publish(self, data: Any, *_: Any, **__: Any) -> None:
            space.part("outputs").of(space).published(data)

        def clear_output(self, wait: bool = False) -> None:
            space.part("outputs").of(space).clear(wait)

    class Shell(InteractiveShell):  # type: ignore[misc]
        holding: list[BaseException] | None = None
        """Failures of cells inside of `%%capture`, until that has kept what they printed."""

        def settle(self) -> None:
            """What differs from IPython's own, once that is there."""
            notebook = space.part("notebook")
            self.events.unregister("pre_execute", self._clear_warning_registry)
            for name in ("exit", "quit"):  # Python's own leave a cell too, also inside of a magic
                self.builtin_trap.auto_builtins.pop(name, None)
            if not isinstance(self.magics_manager.magics["line"]["cd"], types.MethodType):  # stand-ins, which come back
                self.register_magics(*(getattr(classes, name + "Magics") for name in FAMILIES))
            self.display_pub = self.publisher = Publisher(parent=self)
            self.display_formatter.format = self.forms
            self.set_hook("show_in_pager", page.as_hook(magic.show_page), 0)
            scripts = notebook.Scripts(space.names)
            self.register_magic_function(notebook.pip, "line", "pip")
            self.register_magic_function(scripts.run, "cell", "script")
            self.register_magic_function(scripts.kill, "line", "killbgscripts")
            for program in notebook.SCRIPTS:
                self.register_magic_function(scripts.magic(program), "cell", program)
            magics = self.magics_manager.magics
            for name, reason in magic.REFUSED.items():
                for mark, kind in (("%", "line"), ("%%", "cell")):
                    if name in magics[kind]:
                        self.register_magic_function(magic.refusal(UsageError, mark + name, reason), kind, name)
            for kind, name in (("line", "prun"), ("cell", "prun"), ("line", "run")):
                magics[kind][name] = magic.leaving_out(magics[kind][name])
            self.register_magic_function(self.enable_gui, "line", "gui")
            magics["cell"]["capture"] = self._kept(magics["cell"]["capture"])
            for kind in ("line", "cell"):
                magics[kind]["time"] = magic.awaiting(space, magics[kind]["time"])
            magics["line"]["cd"] = magic.failing(magics["line"]["cd"])
            magics["line"]["matplotlib"] = magic.listing(magics["line"]["matplotlib"])
            magics["line"]["autoawait"] = magic.only_shown(UsageError, magics["line"]["autoawait"])

        def forms(self, value: Any, include: Any = None, exclude: Any = None) -> tuple[dict[Any, Any], dict[Any, Any]]:
            """A display formatter's `format`: nothing when the value has shown itself."""
            found = space.part("outputs").of(space).forms(value)
            return {k: v for k, v in found.items() if (not include or k in include) and k not in (exclude or ())}, {}

        def init_user_ns(self) -> None:
            super().init_user_ns()
            for name in ("exit", "quit", "Out"):  # Python's own leave a cell too; a value is kept as `_` and no longer
                self.user_ns.pop(name, None)
            self.user_ns["In"] = self.history_manager.input_hist_parsed = self.history_manager.input_hist_raw = (
                space.inputs
            )

        def system(self, command: str) -> None:
            self.user_ns["_exit_code"] = space.part("notebook").shell(self.var_expand(command, depth=1))

        def _kept(self, capture: Any) -> Any:
            """`%%capture`, whose variable is there also when the cell fails."""

            @functools.wraps(capture)
            def captured(line: str, cell: str) -> Any:
                failures: list[BaseException] = []
                before, self.holding = self.holding, failures
                try:
                    value = capture(line, cell)
                finally:
                    self.holding = before
                if failures:
                    raise failures[0]
                return value

            return captured

        def getoutput(self, cmd: str, split: bool = True, depth: int = 0) -> Any:
            """`x = !cmd`; it flushes streams that a cell may have put others in the place of."""
            standing = sys.stdout, sys.stderr
            if not all(hasattr(stream, "flush") for stream in standing):
                sys.stdout, sys.stderr = space.streams.stdout, space.streams.stderr
            try:
                return super().getoutput(cmd, split, depth + 1)
            finally:
                sys.stdout, sys.stderr = standing

        def ask_exit(self) -> None:
            raise SystemExit

        def ask_yes_no(self, prompt: str, default: Any = None, interrupt: Any = None) -> bool:
            raise StdinNotImplementedError(magic.KEYBOARD)

        def set_next_input(self, text: str, replace: bool = False) -> None:
            raise UsageError(
                "that puts text into a notebook's next cell, and a sandbox has none. Print it, or run it: %run, %rerun"
            )

        def enable_gui(self, gui: Any = None) -> None:
            if gui not in (None, "", "inline", "asyncio"):
                raise UsageError(f"%gui {gui}: a sandbox has no screen, so no windows; figures are shown as outputs")

        def enable_matplotlib(self, gui: Any = None) -> Any:
            name = "inline" if gui in (None, "auto") else str(gui)
            if name not in magic.BACKENDS:
                raise UsageError(
                    f"%matplotlib {gui}: a sandbox has no screen, so no windows; backends: {', '.join(magic.BACKENDS)}. "
                    "Figures are shown as outputs with each of them"
                )
            if name == "agg":
                import matplotlib.pyplot  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

                matplotlib.pyplot.switch_backend("agg")
                return None, "agg"
            chosen = super().enable_matplotlib("inline")
            for shown in list(self.events.callbacks["post_execute"]):  # figures are shown at the end of a cell already
                if getattr(shown, "__wrapped__", shown).__name__ == "flush_figures":
                    self.events.unregister("post_execute", shown)
            return chosen

        def showtraceback(self, exc_tuple: Any = None, *_: Any, **__: Any) -> None:
            """What a magic would only show ends the cell, as it would without the magic."""
            _, value, _trace = self._get_exc_info(exc_tuple)
            caller = sys._getframe(1).f_code.co_filename
            if "/IPython/" in caller and not caller.endswith(ASIDE):
                raise value
            space.tell(value)

        def showsyntaxerror(self, *_: Any, **__: Any) -> None:
            self.showtraceback()

        def safe_execfile(self, fname: Any, *where: Any, exit_ignore: bool = False, **how: Any) -> Any:
            try:
                with open(fname, "rb"):
                    pass
                return super().safe_execfile(fname, *where, **{**how, "raise_exceptions": True})
            except SystemExit:
                if not exit_ignore:
                    raise
                return None

        def run_cell(
            self,
            raw_cell: str,
            store_history: bool = False,
            silent: bool = False,
            shell_futures: bool = True,
            *_: Any,
            **__: Any,
        ) -> Any:
            """A cell within a cell, for magics and for whoever asks; to a magic its failure is one of its own."""
            result = ExecutionResult(ExecutionInfo(raw_cell, store_history, silent, shell_futures, None))
            caller = sys._getframe(1).f_code
            inner = "/IPython/" in caller.co_filename
            try:
                space.run_within(raw_cell)
            except BaseException as exc:
                if self.holding is not None and inner and caller.co_name == "capture":
                    self.holding.append(exc)
                    return result
                if inner or not isinstance(exc, Exception):
                    raise
                result.error_in_exec = exc
                space.tell(exc)
            return result

    Shell.__name__ = "InteractiveShell"  # for `%config`
    return Shell


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
