"""Host names, read in one place: whatever compares a name with a policy has it from here.

Two programs that read one name differently are a way around a policy. So what is no plain host name is refused, not repaired.
"""

from __future__ import annotations

import re
from typing import Final

import idna

NAME_MAX: Final = 253
"""Characters of a name, as DNS counts them."""
_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?:{_LABEL}\.)*{_LABEL}")
_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
"""What some programs take for an IPv4 address, however it is spelt: 127.0.0.1, 0x7f.1, 2130706433."""
_AUTHORITY: Final = re.compile(r"([^:]*)(?::([0-9]{1,5}))?")


class BadName(ValueError):
    """Not a host name."""


def read(text: str) -> str:
    """A name in the form that is compared: lower case, no dot at the end.

    Allowed: ASCII letters, digits, `-` and `_` in labels of 1 to 63 characters, at most 253 characters, one dot at the end.
    Raises BadName, for addresses too, in whatever notation.
    """
    if not text.isascii():
        raise BadName("it is not ASCII")
    name = text.removesuffix(".").lower()
    if len(name) > NAME_MAX or not _NAME.fullmatch(name):
        raise BadName("it is no host name")
    if _NUMBER.fullmatch(name):
        raise BadName("it is an address")
    return name


def read_authority(text: str) -> tuple[str, int | None]:
    """`name` or `name:port`, as in a Host header or a URL without a user. Raises BadName."""
    found = _AUTHORITY.fullmatch(text)
    if found is None or int(found[2] or 0) > 0xFFFF:
        raise BadName("it is no host name with a port")
    return read(found[1]), None if found[2] is None else int(found[2])


def read_typed(text: str) -> str:
    """A name as people type it: spaces around it, and letters beyond ASCII (IDNA 2008 as browsers do it). Raises BadName."""
    text = text.strip()
    if text.isascii():
        return read(text)
    try:
        return read(idna.encode(text, uts46=True).decode())
    except UnicodeError as exc:
        raise BadName(str(exc)) from exc


def of_service(name: str) -> str:
    """The host in a name such as _http._tcp.packages.example, which is asked for a service of it; any other name as it is."""
    while name.startswith("_") and "." in name:
        name = name.partition(".")[2]
    return name


def shown(text: str) -> str:
    """Any text as it may stand in a log: printable ASCII, at most 253 characters."""
    return ascii(text)[1:-1][:NAME_MAX]
