"""Why a sandbox ended that nobody asked to end: one sentence for people, from what its node and its console said."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Final

from instavm.contract.sandboxes import EndReason
from instavm.control.store.sessions import VmRow

CONSOLE_KEPT: Final = timedelta(days=30)
"""How long the last lines of a console are kept after the end of their sandbox; its record stays."""
_SENTENCES: Final[Mapping[EndReason, str]] = {
    EndReason.BOOT_FAILED: "The sandbox did not come up",
    EndReason.CRASHED: "The sandbox ended by itself",
    EndReason.OVER_LIMIT: "The sandbox used more of the host than it may",
    EndReason.NODE_LOST: "The sandbox was lost with its server",
}
_SIGNS: Final[Mapping[str, str]] = {
    "Kernel panic": "the guest's kernel panicked",
    "Out of memory": "the guest ran out of memory",
}
"""What a console shows of a cause, in the order in which they are looked for."""


def cause(vm: VmRow) -> str | None:
    """None for one that lives, or ended on purpose."""
    sentence = None if vm.why is None else _SENTENCES.get(vm.why)
    if sentence is None:
        return None
    sign = next((words for sign, words in _SIGNS.items() if sign in (vm.console or "")), None)
    return ": ".join(part for part in (sentence, sign, vm.detail) if part)
