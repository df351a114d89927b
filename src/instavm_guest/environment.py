"""Variables that reach an interpreter which runs already, and that Python reads only when it starts. See worker.py.

What a running interpreter can still heed it is told by `apply`. For the rest, `needs_a_new_one` has the agent start a new
interpreter instead; it is the agent, too, who knows whether a cell has run in the old one.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

AT_START = frozenset(
    "PYTHON" + name
    for name in (
        *(
            "HASHSEED",
            "OPTIMIZE",
            "UTF8",
            "MALLOC",
            "MALLOCSTATS",
            "HOME",
            "PLATLIBDIR",
            "NOUSERSITE",
            "USERBASE",
            "DEVMODE",
        ),
        *(
            "FAULTHANDLER",
            "TRACEMALLOC",
            "ASYNCIODEBUG",
            "INTMAXSTRDIGITS",
            "SAFEPATH",
            "PROFILEIMPORTTIME",
            "VERBOSE",
            "DEBUG",
        ),
        *(
            "INSPECT",
            "COERCECLOCALE",
            "NODEBUGRANGES",
            "PERFSUPPORT",
            "WARNDEFAULTENCODING",
            "THREADDEBUG",
            "EXECUTABLE",
        ),
        *("_GIL", "_JIT", "_CPU_COUNT", "_FROZEN_MODULES", "_COLORS", "_CONTEXT_AWARE_WARNINGS"),
    )
) | {"GLIBC_TUNABLES", "IPYTHONDIR", "OPENSSL_CONF", "OPENSSL_MODULES"}
"""Read once, by Python or by libraries that are loaded with it."""
AT_START_BEGIN = ("LD_", "MALLOC_")
LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")
"""The first of these that is set names the locale."""

_had: dict[str, list[Any]] = {"path": [], "options": [], "filters": []}
"""What earlier values of variables brought, which goes when there is another value."""


def needs_a_new_one(begun: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Those of the variables `new` that an interpreter, begun with `begun`, does not heed any more, sorted."""
    found = {name for name, value in new.items() if _only_at_start(name) and begun.get(name, "") != value}
    before, after = _encoding(begun), _encoding({**begun, **new})
    if before != after:
        found |= {name for name in LOCALE if name in new}
    return sorted(found)


def apply(new: Mapping[str, str], streams: Any) -> None:
    """Do what Python does with these variables when it starts. `os.environ` has them already."""
    if "TZ" in new:
        time.tzset()
    if "PYTHONPATH" in new:
        _search(new["PYTHONPATH"])
    if "PYTHONWARNINGS" in new:
        _warn(new["PYTHONWARNINGS"])
        streams.quiet()
    if "PYTHONDONTWRITEBYTECODE" in new:
        sys.dont_write_bytecode = bool(new["PYTHONDONTWRITEBYTECODE"])
    if "PYTHONPYCACHEPREFIX" in new:
        sys.pycache_prefix = new["PYTHONPYCACHEPREFIX"] or None
    if "PYTHONIOENCODING" in new:
        _encode(new["PYTHONIOENCODING"], streams)
    if new.get("PYTHONUNBUFFERED"):
        for stream in (streams.stdout, streams.stderr):
            stream.reconfigure(write_through=True)
    if any(name in new for name in LOCALE):
        import locale  # noqa: PLC0415 (only then)

        try:
            locale.setlocale(locale.LC_CTYPE, "")
        except locale.Error:
            return  # the image has no such locale; Python itself starts without a word then


def _only_at_start(name: str) -> bool:
    return name in AT_START or name.startswith(AT_START_BEGIN)


def _encoding(env: Mapping[str, str]) -> str:
    """utf8, or the locale that says otherwise."""
    name = next((env[name] for name in LOCALE if env.get(name)), "C.UTF-8")
    charset = name.partition("@")[0].partition(".")[2].lower().replace("-", "")
    return "utf8" if charset == "utf8" else name


def _search(value: str) -> None:
    for place in _had["path"]:
        if place in sys.path:
            sys.path.remove(place)
    _had["path"] = [os.path.abspath(place) for place in value.split(":")] if value else []
    start = 1 if sys.path[:1] == [""] else 0
    sys.path[start:start] = _had["path"]


def _warn(value: str) -> None:
    both: Any = (("options", sys.warnoptions), ("filters", warnings.filters))
    for kept, all_of_them in both:
        for one in _had[kept]:
            if one in all_of_them:
                all_of_them.remove(one)
    warnings._filters_mutated()  # type: ignore[attr-defined]
    options = value.split(",") if value else []
    before = list(warnings.filters)
    warnings._processoptions(options)  # type: ignore[attr-defined]
    _had["options"], _had["filters"] = options, [one for one in warnings.filters if one not in before]
    sys.warnoptions[:0] = options


def _encode(value: str, streams: Any) -> None:
    encoding, _, errors = value.partition(":")
    streams.encoding, streams.errors = encoding or streams.encoding, errors or "strict"
    streams.stdin.reconfigure(encoding=streams.encoding, errors=streams.errors)
    streams.stdout.reconfigure(encoding=streams.encoding, errors=streams.errors)
    streams.stderr.reconfigure(encoding=streams.encoding)
