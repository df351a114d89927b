"""From what pydantic found to one `InvalidInput` that names the field and what is allowed there.

Client and server both refuse through this function, so a value is refused in the same words on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from instavm import limits
from instavm.errors import BadRequest, InvalidInput

HIDDEN = frozenset({"env", "api_key", "entries", "data"})
"""Fields whose values must not be repeated in an error."""


def refusal(found: Sequence[Mapping[str, Any]]) -> InvalidInput:
    """The first of pydantic's `errors()`, in our words. `found` is not empty."""
    first = found[0]
    loc = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path")]
    field = loc[0] if loc else "body"
    if first["type"] == "json_invalid":
        return BadRequest("body", "text that is not JSON", "a JSON object")
    allowed = limits.ALLOWED.get(field, str(first["msg"]))
    if field in HIDDEN:
        return InvalidInput(field, _why(first), allowed)
    if first["type"] == "missing":
        return InvalidInput(field, None, allowed)
    return InvalidInput(field, first.get("input"), allowed)


def _why(found: Mapping[str, Any]) -> str:
    """What is wrong with a hidden value: our own words, which name a variable but never hold a value."""
    if found["type"] == "value_error":
        return str(found["msg"]).removeprefix("Value error, ")
    return f"a value of the wrong type ({found['type']})"
