"""The table of a sandbox's life: every pair of states, and every reason."""

import itertools

import pytest

from instavm.contract.sandboxes import EndReason
from instavm.control.lifecycle import NEXT, IllegalMove, Lifecycle, State, word


@pytest.mark.parametrize(("was", "new"), list(itertools.product(State, State)))
def test_only_the_moves_of_the_table_are_possible(was, new):
    why = EndReason.KILLED if new is State.ENDING else None
    life = Lifecycle(was)
    if new in NEXT[was]:
        life.to(new, why)
        assert (life.state, life.why) == (new, why)
    else:
        with pytest.raises(IllegalMove, match=f"{was} -> {new}"):
            life.to(new, why)
        assert life.state is was


def test_an_end_needs_a_reason_and_nothing_else_has_one():
    with pytest.raises(ValueError, match="reason"):
        Lifecycle(State.ACTIVE).to(State.ENDING)
    with pytest.raises(ValueError, match="reason"):
        Lifecycle(State.CREATING).to(State.ACTIVE, EndReason.KILLED)


def test_the_reason_stays():
    life = Lifecycle(State.ACTIVE)
    life.to(State.ENDING, EndReason.LIFETIME)
    life.to(State.ENDED)
    assert life.why is EndReason.LIFETIME


def test_every_state_leads_to_the_end():
    reached = {State.ENDED}
    for _ in State:
        reached |= {state for state, after in NEXT.items() if after & reached}
    assert reached == set(State)


def test_the_words_that_clients_see():
    assert word(State.CREATING, None) == "creating"
    assert word(State.ACTIVE, None) == "active"
    words = {why: word(State.ENDED, why) for why in EndReason}
    assert words[EndReason.KILLED] == words[EndReason.LIFETIME] == "killed"
    assert words[EndReason.BOOT_FAILED] == words[EndReason.CRASHED] == "failed"
    assert "active" not in words.values()
