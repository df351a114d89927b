"""What a guest's serial console said last, as text that can be shown: a guest may write anything to it."""

from __future__ import annotations

import re
from typing import Final

import anyio

from instavm.errors import InstaVMError
from instavm.node.vmm.base import Machine

LINES: Final = 20
LINE_CHARS: Final = 200
DEADLINE_S: Final = 1.0
"""How long a VMM may take to tell it."""
_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")


def tail(text: str) -> str:
    """The last lines, without escape sequences and control characters."""
    plain = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    lines = [
        "".join(char for char in line if char.isprintable() or char == "\t")[:LINE_CHARS] for line in plain.split("\n")
    ]
    return "\n".join([line for line in lines if line.strip()][-LINES:])


async def last_lines(machine: Machine) -> str:
    """Of a machine that is alive or dead; empty where it does not tell them in time."""
    with anyio.move_on_after(DEADLINE_S, shield=True):
        try:
            return tail(await machine.console())
        except (InstaVMError, OSError):
            return ""
    return ""
