"""Magics of IPython that do another thing in a sandbox than at a keyboard. Runs in the image's Python, see interactive.py."""

from __future__ import annotations

import ast
import cProfile
import functools
import os
import time
from collections.abc import Callable
from contextvars import copy_context
from resource import RUSAGE_SELF, getrusage
from typing import Any

CO_COROUTINE = 0x80
TIMED = "<timed>"
"""Under this name, which no program can write, a cell that is timed leaves its last expression's value."""
BACKENDS = ("inline", "agg")
"""Of matplotlib's, those that need no screen."""
KEYBOARD = "it asks somebody at a keyboard, and a sandbox has nobody there"
SHOWS = "it changes how IPython shows things, and in a sandbox Python itself shows them"
LOG = "it writes down what is typed at IPython's prompt, and a sandbox has none; `%history -f file` writes all cells"
REFUSED = {
    **dict.fromkeys(("debug", "pdb"), KEYBOARD),
    **dict.fromkeys(("edit", "ed"), "it opens an editor, and " + KEYBOARD),
    **dict.fromkeys(("xmode", "colors", "precision", "pprint", "doctest_mode", "autoindent"), SHOWS),
    **dict.fromkeys(("automagic", "autocall"), "words without a mark are always Python here"),
    **dict.fromkeys(("logstart", "logon", "logoff", "logstop", "logstate"), LOG),
}
"""Magics that would do nothing, or wait for ever, by the reason."""


class _Leaving(BaseException):
    """A SystemExit on its way through the profiler, which would swallow it."""


class _Profile(cProfile.Profile):
    def runctx(self, *args: Any, **more: Any) -> Any:
        try:
            return super().runctx(*args, **more)
        except SystemExit as exc:
            raise _Leaving(exc) from None


def show_page(text: Any, start: int = 0, *_: Any, **__: Any) -> None:
    """A pager's page: printed, as a result has no pages."""
    whole = text.get("text/plain", "") if isinstance(text, dict) else text
    print("\n".join(whole.splitlines()[start:]))


def refusal(error: type[Exception], shown: str, reason: str) -> Callable[..., None]:
    def refused(line: str = "", cell: str | None = None) -> None:
        raise error(f"{shown} is not there: {reason}")

    return refused


def leaving_out(magic: Any) -> Any:
    @functools.wraps(magic)
    def left(*args: Any, **more: Any) -> Any:
        kept, cProfile.Profile = cProfile.Profile, _Profile  # type: ignore[misc]
        try:
            return magic(*args, **more)
        except _Leaving as exc:
            raise exc.args[0] from None
        finally:
            cProfile.Profile = kept  # type: ignore[misc]

    return left


def awaiting(space: Any, magic: Any) -> Any:
    """`%time` and `%%time`, which know of no `await`."""

    @functools.wraps(magic)
    def timed(line: str = "", cell: str | None = None, local_ns: Any = None) -> Any:
        code = None if line and cell else _awaited(space, cell or line)
        if code is None:
            return magic(line, cell, local_ns)
        values: list[Any] = []
        began, spent = time.perf_counter(), getrusage(RUSAGE_SELF)
        try:
            space.part("loops").of(space).run(eval(code, space.names), values.append, copy_context())
        finally:
            wall, now = time.perf_counter() - began, getrusage(RUSAGE_SELF)
            user, system = now.ru_utime - spent.ru_utime, now.ru_stime - spent.ru_stime
            print(f"CPU times: user {user:.3g} s, sys: {system:.3g} s, total: {user + system:.3g} s")
            print(f"Wall time: {wall:.3g} s")
        return space.names.pop(TIMED, *values)

    return timed


def _awaited(space: Any, source: str) -> Any:
    """The code of a cell that awaits something; its last expression's value is left under TIMED. Else None."""
    if "await" not in source and "async" not in source:
        return None
    try:
        tree = space.notebook.transformed(ast.parse(space.notebook.rewritten(source)))
        if isinstance(tree.body[-1], ast.Expr):
            last = tree.body[-1]
            tree.body[-1] = ast.copy_location(ast.Assign([ast.Name(TIMED, ast.Store())], last.value), last)
            ast.fix_missing_locations(tree)
        code = compile(tree, "<timed exec>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except (SyntaxError, IndexError):
        return None
    return code if code.co_flags & CO_COROUTINE else None


def failing(magic: Any) -> Any:
    """`%cd`, which tells what is wrong with a folder and succeeds."""

    @functools.wraps(magic)
    def changed(line: str = "") -> Any:
        place = line.replace("-q", "", 1).strip() if line.startswith("-q") else line.strip()
        folder = os.path.expanduser(place.strip("'\""))
        if (
            place
            and place[0] != "-"
            and not os.path.isdir(folder)
            and place not in magic.__self__.shell.db.get("bookmarks", {})
        ):
            os.chdir(folder)  # raises what is wrong with it
        return magic(line)

    return changed


def listing(magic: Any) -> Any:
    @functools.wraps(magic)
    def listed(line: str = "") -> Any:
        if {"-l", "--list"} & set(line.split()):
            print(f"Available matplotlib backends: {list(BACKENDS)}")
            return None
        return magic(line)

    return listed


def only_shown(error: type[Exception], magic: Any) -> Any:
    @functools.wraps(magic)
    def shown(line: str = "") -> Any:
        if line.strip().lower() not in ("", "on", "true", "asyncio"):
            raise error(f"%autoawait {line.strip()}: cells await on asyncio's loop here, and no other")
        return magic("")

    return shown
