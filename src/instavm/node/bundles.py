"""A rich output as a guest tells it: what is not exactly of the shape that all behind us can hold ends the line."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from instavm import limits
from instavm.contract.executions import Bundle
from instavm_guest import frames

MIME = re.compile(r"[a-z]+/[A-Za-z0-9.+_-]{1,120}")
INTEGERS: Final = (-(1 << 63), (1 << 64) - 1)
"""What the border between the two processes can carry."""
CLEAR: Final = "application/vnd.instavm.clear+json"
"""A bundle of this type alone says that the outputs before it are to be forgotten."""
_LONG = re.compile(rb"\d{19}")


def read(data: bytes) -> Bundle:
    """The bundle {MIME type: data}. Raises FrameError."""
    bundle = frames.decode_json(data)
    if not all(MIME.fullmatch(mime) for mime in bundle):
        raise frames.FrameError("an output's type is not a MIME type")
    if data.count(b"[") + data.count(b"{") > limits.OUTPUT_DEPTH and _too_deep(bundle):
        raise frames.FrameError(f"an output has more than {limits.OUTPUT_DEPTH} lists or objects in one another")
    try:
        json.dumps(bundle, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as exc:  # half a character, or no number
        raise frames.FrameError(f"an output is no JSON in UTF-8: {exc}") from None
    if _LONG.search(data) and not _all_fit(bundle):
        raise frames.FrameError("an output has a number of more than 64 bits")
    return bundle


def _too_deep(bundle: Bundle) -> bool:
    level: list[Any] = [bundle]
    for _ in range(limits.OUTPUT_DEPTH):
        within = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for some in within for one in some if isinstance(one, (dict, list))]
    return bool(level)


def _all_fit(value: Any) -> bool:
    """Of what is not too deep."""
    if isinstance(value, dict):
        return all(map(_all_fit, value.values()))
    if isinstance(value, list):
        return all(map(_all_fit, value))
    return not isinstance(value, int) or INTEGERS[0] <= value <= INTEGERS[1]
