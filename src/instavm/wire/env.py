"""Environment variables as they arrive: scalars become strings, anything nested is refused."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

from instavm import limits

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def coerce(value: object) -> object:
    """`None` → no variables; names are checked; str, int, float and bool become what a shell would be given.

    Raises: ValueError. Its text may name a variable, never its value.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("not an object of name → value")
    if len(value) > limits.ENV_VARIABLES:
        raise ValueError(f"{len(value)} variables")
    env = {_name(name): _value(name, one) for name, one in value.items()}
    size = sum(len(name.encode()) + len(one.encode()) + 2 for name, one in env.items())
    if size > limits.ENV_BYTES:
        raise ValueError(f"{size} bytes")
    return env


def _name(name: object) -> str:
    if not isinstance(name, str) or not NAME.match(name):
        raise ValueError(f"the name {str(name)[:80]!r}")
    return name


def _value(name: object, value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case None:
            return ""
        case int() | float():
            return str(value)
        case str() if "\0" not in value and _encodes(value):
            return value
        case str():
            raise ValueError(f"the value of {name}: it holds NUL or a lone surrogate")
        case _:
            raise ValueError(f"the value of {name}: it is a {type(value).__name__}")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Env = Annotated[dict[str, str], BeforeValidator(coerce), Field(repr=False)]
