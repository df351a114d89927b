"""The reference page of all settings, made from `Settings`: `python -m instavm.settings_page > docs/settings.md`."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args, get_origin

from pydantic.fields import FieldInfo

from instavm.settings import CLIENT_ONLY, Places, Settings

SIGNS: Final = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
"""How pydantic calls a bound, and how it is written."""
HEAD: Final = """# Settings

Every setting is an environment variable. A server reads them once, when it starts; a name that begins with `INSTAVM_` and is not
listed here is refused, with the nearest name that exists. Lists are written as JSON. This page is made from
`src/instavm/settings.py` by `python -m instavm.settings_page`.

| variable | values | default | meaning |
| --- | --- | --- | --- |
"""


def page() -> str:
    rows = [_row(name, values, default, meaning) for name, values, default, meaning in _all()]
    return HEAD + "\n".join(rows) + "\n"


def _all() -> Iterator[tuple[str, str, str, str]]:
    for name, meaning in CLIENT_ONLY.items():
        yield name, "text", "none", meaning
    meanings = {**_docstrings(Places), **_docstrings(Settings)}
    for name, field in Settings.model_fields.items():
        yield f"INSTAVM_{name.upper()}", _values(field), _default(field), meanings.get(name, "")


def _row(name: str, values: str, default: str, meaning: str) -> str:
    return "| " + " | ".join(one.replace("|", "\\|") for one in (f"`{name}`", values, default, meaning)) + " |"


def _docstrings(kind: type) -> dict[str, str]:
    """Attribute → the text below it, on one line."""
    found: dict[str, str] = {}
    (made,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(made, ast.ClassDef)
    for before, after in zip(made.body, made.body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def _values(field: FieldInfo) -> str:
    kind: Any = field.annotation
    bounds = [f"{SIGNS[name]} {getattr(one, name)}" for one in field.metadata for name in SIGNS if hasattr(one, name)]
    return ", ".join([_kind(kind), *bounds])


def _kind(kind: Any) -> str:
    """A type in words, without the None that stands for "not set"."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is tuple:
        return "list of text"
    if inner and all(isinstance(one, str) for one in inner):
        return ", ".join(f"`{one}`" for one in inner)
    if inner:
        return _kind(inner[0])
    return {int: "whole number", float: "number", str: "text", Path: "path"}[kind]


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "see meaning"
    value = field.default
    if value is None or value == ():
        return "none"
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"


if __name__ == "__main__":
    print(page(), end="")  # noqa: T201
