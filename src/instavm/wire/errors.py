"""The body of every error."""

from __future__ import annotations

from typing import Any

from instavm.wire.base import Wire


class Problem(Wire):
    """`detail` is for people: a string, or for a refused value a list of `{loc, msg, type}`."""

    detail: str | list[dict[str, Any]]
    code: str = "internal"
    """For programs; `errors.py` names them all."""
    field: str | None = None
    allowed: str | None = None
    retry_after_s: float | None = None
    """After how many seconds it is worth trying again, if the server knows: as the header `Retry-After` has it, in whole ones."""
