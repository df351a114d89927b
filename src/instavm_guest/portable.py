"""Bundles as the host takes them. Runs in the image's Python, see worker.py.

What a value says of itself is free; the host takes only bundles of known shape, and ends the sandbox for any other. So each
form is brought into that shape here, and what can't be is left out with a line on stderr.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

DEPTH_MAX = 100
"""How deep lists and objects may lie in one another, the bundle itself included."""
INTEGERS = (-(1 << 63), (1 << 64) - 1)
"""Numbers beyond these are told as text."""
MIME = re.compile(r"[a-z]+/[A-Za-z0-9.+_-]{1,120}")
"""All three are the host's too."""
_LONG = re.compile(r"\d{19}")
_TEXTS = frozenset({"image/svg+xml", "application/javascript", "application/xml", "application/xhtml+xml"})
_BYTES = ("image/", "audio/", "video/", "font/")
_BYTES_TOO = frozenset({"application/pdf", "application/octet-stream", "application/zip"})


class Unfit(ValueError):
    """A form that can't be an output; the text says why."""


def encoded(found: Any, note: Callable[[str], None]) -> bytes | None:
    """A bundle as the host takes it, in JSON; None when nothing but its text is left. `note` hears what was left out."""
    if not isinstance(found, Mapping):
        note(f"a bundle was left out: it is a {type(found).__name__}, not a dictionary of MIME types")
        return None
    forms: dict[str, str] = {}
    for key, data in list(found.items()):
        try:
            mime = _type_of(key)
            if data is not None:
                forms[mime] = _as_json(mime, data)
        except Unfit as exc:
            note(f"a form of an output was left out: {exc}")
    if not set(forms) - {"text/plain"}:
        return None
    return ("{" + ", ".join(f'"{mime}": {text}' for mime, text in forms.items()) + "}").encode()


def _type_of(key: Any) -> str:
    """The MIME type without parameters. Raises Unfit."""
    mime = str.__str__(key).partition(";")[0].strip() if isinstance(key, str) else ""
    if not MIME.fullmatch(mime):
        raise Unfit(f"{_short(key)} is no MIME type")
    return mime


def _as_json(mime: str, data: Any) -> str:
    """What stands for `data` in a bundle. Raises Unfit."""
    try:
        if mime in _TEXTS or mime.startswith("text/"):
            return json.dumps(_as_text(data), ensure_ascii=False)
        if mime in _BYTES_TOO or mime.startswith(_BYTES):
            return json.dumps(_as_base64(data))
        text = _at_once(data)
        return text if text is not None else json.dumps(_plain(data, 1), allow_nan=False, ensure_ascii=False)
    except Unfit as exc:
        raise Unfit(f"{mime}: {exc}") from None
    except Exception as exc:  # an object of the user's that fails when it is looked at
        raise Unfit(f"{mime}: {_short(exc)}") from None


def _at_once(data: Any) -> str | None:
    """The JSON of `data`, if that is all that the host takes; a step beside `_plain` that is much faster."""
    try:
        text = json.dumps(data, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError, OverflowError):
        return None
    if _LONG.search(text) or (text.count("[") + text.count("{") >= DEPTH_MAX and _too_deep(data)):
        return None
    return text


def _too_deep(data: Any) -> bool:
    level, depth = [data], 1
    while level and depth < DEPTH_MAX:
        within = (
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list, tuple))
        )
        level = [one for some in within for one in some if isinstance(one, (dict, list, tuple))]
        depth += 1
    return bool(level)


def _as_text(data: Any) -> str:
    if isinstance(data, (list, tuple)) and all(isinstance(line, str) for line in data):
        data = "".join(data)
    if isinstance(data, (bytes, bytearray, memoryview)):
        return bytes(data).decode("utf-8", "replace")
    return _whole_characters(data if isinstance(data, str) else _text_of(data))


def _as_base64(data: Any) -> str:
    if isinstance(data, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(data)).decode()
    try:
        text = "".join(data.split())
        base64.b64decode(text, validate=True)
    except (AttributeError, TypeError, ValueError, binascii.Error):
        raise Unfit("it is neither bytes nor base64") from None
    return str.__str__(text)


def _plain(data: Any, depth: int) -> Any:
    """The nearest thing that JSON and the host know. Raises Unfit, and whatever the user's objects raise."""
    if isinstance(data, (Mapping, list, tuple, set, frozenset)):
        if depth >= DEPTH_MAX:
            raise Unfit(f"more than {DEPTH_MAX} lists or objects in one another")
        if isinstance(data, Mapping):
            return {_as_text(_key(key)): _plain(value, depth + 1) for key, value in data.items()}
        return [_plain(one, depth + 1) for one in data]
    if isinstance(data, (bytes, bytearray, memoryview)):
        return base64.b64encode(bytes(data)).decode()
    return _number(data) if data is None or isinstance(data, (int, float)) else _whole_characters(_text_of(data))


def _number(data: Any) -> Any:
    """One that fits, as text one that does not; None for what is no number."""
    if data is None or isinstance(data, bool):
        return data
    if isinstance(data, float):
        return float(data) if math.isfinite(data) else None
    return int(data) if INTEGERS[0] <= data <= INTEGERS[1] else _text_of(data)


def _key(key: Any) -> Any:
    """As json.dumps writes keys; others as their text."""
    if key is None or isinstance(key, (bool, float)):
        return json.dumps(key)
    return key


def _text_of(data: Any) -> str:
    try:
        return data if isinstance(data, str) else str(data)
    except ValueError:  # a number with more digits than Python writes
        return hex(data)


def _whole_characters(text: str) -> str:
    """With U+FFFD for halves of characters, which UTF-8 can't hold."""
    text = str.__str__(text)
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:99] + "…"
