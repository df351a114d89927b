"""A sandbox's life as a table. No I/O, so a test can walk every pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from instavm.contract.sandboxes import EndReason


class State(StrEnum):
    CREATING = "creating"
    ACTIVE = "active"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    """At rest: nothing of it runs, all of it is on disk."""
    ENDING = "ending"
    ENDED = "ended"


NEXT: Final[Mapping[State, frozenset[State]]] = {
    State.CREATING: frozenset({State.ACTIVE, State.ENDING}),
    State.ACTIVE: frozenset({State.SUSPENDING, State.ENDING}),
    State.SUSPENDING: frozenset({State.ACTIVE, State.SUSPENDED, State.ENDING}),
    State.SUSPENDED: frozenset({State.ENDING}),
    State.ENDING: frozenset({State.ENDED}),
    State.ENDED: frozenset(),
}
assert NEXT.keys() == set(State), "every state needs a row"

WORD_OF_END: Final[Mapping[EndReason, str]] = {
    EndReason.KILLED: "killed",
    EndReason.LIFETIME: "killed",
    EndReason.BOOT_FAILED: "failed",
    EndReason.CRASHED: "failed",
    EndReason.OVER_LIMIT: "failed",
    EndReason.NODE_LOST: "failed",
    EndReason.SERVER_STOPPED: "terminated",
    EndReason.RESUMED: "terminated",
}
assert WORD_OF_END.keys() == set(EndReason), "every reason needs a word"


STATES_OF_WORD: Final[Mapping[str, tuple[tuple[State, EndReason | None], ...]]] = {
    **{str(state): ((state, None),) for state in State if state not in (State.ENDING, State.ENDED)},
    **{
        status: tuple((state, why) for why, of in WORD_OF_END.items() if of == status for state in State)
        for status in WORD_OF_END.values()
    },
}
"""The states and reasons that one status stands for: `word` the other way round."""


class IllegalMove(Exception):
    """A bug in control: it tried to move a sandbox to where it cannot go."""


@dataclass(slots=True)
class Lifecycle:
    state: State = State.CREATING
    why: EndReason | None = None

    def to(self, new: State, why: EndReason | None = None) -> None:
        """The only code that moves a sandbox. Raises: IllegalMove; ValueError for an end without a reason."""
        if new not in NEXT[self.state]:
            raise IllegalMove(f"{self.state} -> {new}")
        if (new is State.ENDING) != (why is not None):
            raise ValueError("a reason goes with ENDING, and only with it")
        self.state, self.why = new, why or self.why


def word(state: State, why: EndReason | None) -> str:
    """The status that clients see. From the moment it is ending, a sandbox is gone for them."""
    return str(state) if why is None else WORD_OF_END[why]
