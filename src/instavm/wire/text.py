"""Values that JSON can carry: what comes in is checked (`flaw`), what goes out is made so (`presentable`).

Python holds text that UTF-8 can't write (lone surrogates), numbers that JSON does not have, and values nested deeper than a
writer follows. Each of them would be an error after the work was done.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from instavm import limits

CUT: Final = "… nested too deep"


def flaw(value: Any, depth: int = limits.JSON_DEPTH) -> str | None:
    """Why JSON can't carry `value`, in words that do not repeat it; None: it can."""
    match value:
        case str():
            return None if _encodes(value) else "text with a lone surrogate, which is no character"
        case float():
            return None if math.isfinite(value) else "a number that is not finite"
        case dict() | list() | tuple():
            if depth == 0:
                return f"values nested more than {limits.JSON_DEPTH} deep"
            inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            return next((found for one in inside if (found := flaw(one, depth - 1)) is not None), None)
    return None


def presentable(value: Any, depth: int = limits.JSON_DEPTH) -> Any:
    """`value` as JSON can carry it: what it can't becomes U+FFFD, null, or a word that says so."""
    match value:
        case str():
            return shown(value)
        case float():
            return value if math.isfinite(value) else None
        case dict():
            if depth == 0:
                return CUT
            return {shown(str(key)): presentable(one, depth - 1) for key, one in value.items()}
        case list() | tuple():
            return CUT if depth == 0 else [presentable(one, depth - 1) for one in value]
    return value


def shown(text: str) -> str:
    """Text with U+FFFD where it has lone surrogates."""
    return text if _encodes(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parsed(text: str | bytes) -> Any:
    """Of JSON. Raises ValueError, for values that are nested too deep as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
