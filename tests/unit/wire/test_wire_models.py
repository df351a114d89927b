"""What the models of the wire take, and what they make of it."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from instavm import limits
from instavm.errors import BadRequest, InvalidInput
from instavm.wire.base import to_text
from instavm.wire.env import coerce
from instavm.wire.executions import Execute
from instavm.wire.sessions import CreateSession
from instavm.wire.validation import refusal

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"]))


def test_nothing_given_means_the_defaults():
    for given_ in (
        {},
        {"vcpu_count": None, "memory_mb": None, "vm_lifetime_seconds": None, "env": None, "metadata": None},
    ):
        ask = CreateSession.model_validate(given_)
        assert (ask.vcpu_count, ask.memory_mb, ask.vm_lifetime_seconds) == (2, 512, 300)
        assert (ask.env, ask.metadata) == ({}, {})


def test_unknown_fields_are_ignored():
    assert CreateSession.model_validate({"egress_of_the_future": 1}).vcpu_count == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "x"), (5, "5"), (1.5, "1.5"), (True, "true"), (False, "false"), (None, ""), ("a=b", "a=b")],
)
def test_scalars_become_text(value, text):
    assert coerce({"A": value}) == {"A": text}


@given(st.dictionaries(NAMES, SCALARS, max_size=20))
def test_any_environment_of_scalars_is_taken_or_refused_whole(env):
    """What comes out could be handed to a process: text without NUL. A value is never told."""
    try:
        taken = coerce(env)
    except ValueError as exc:
        assert "NUL" in str(exc)
        return
    assert taken.keys() == env.keys()
    assert all(isinstance(value, str) and "\0" not in value for value in taken.values())


@given(st.text(max_size=8))
def test_a_name_is_taken_only_when_a_shell_could_use_it(name):
    good = name.isascii() and name.isidentifier()
    try:
        coerce({name: "x"})
    except ValueError:
        assert not good
    else:
        assert good


@given(st.integers())
def test_every_whole_number_in_range_is_a_size_and_no_other(number):
    for field, low, high in (
        ("vcpu_count", limits.VCPUS_MIN, limits.VCPUS_MAX),
        ("memory_mb", limits.MEMORY_MIB_MIN, limits.MEMORY_MIB_MAX),
        ("vm_lifetime_seconds", limits.LIFETIME_S_MIN, limits.LIFETIME_S_MAX),
    ):
        try:
            CreateSession.model_validate_json(json.dumps({field: number}))
        except ValidationError as exc:
            told = refusal(exc.errors())
            assert not low <= number <= high
            assert told.field == field
            assert f"{low} to {high}" in told.allowed
        else:
            assert low <= number <= high


def test_command_and_code_are_the_same_and_code_wins():
    assert Execute.model_validate({"command": "a"}).command == "a"
    assert Execute.model_validate({"code": "b"}).command == "b"
    assert Execute.model_validate({"command": "a", "code": "b"}).command == "b"
    with pytest.raises(BadRequest):
        Execute.model_validate({"language": "python"})


def test_code_that_is_not_unicode_is_refused():
    with pytest.raises(InvalidInput, match="surrogate"):
        Execute.model_validate({"command": "print('\ud800')"})


def test_times_are_utc_text_that_sorts():
    here = datetime(2026, 3, 1, 12, 0, tzinfo=timezone(timedelta(hours=2)))
    assert to_text(here) == "2026-03-01T10:00:00.000000Z"


@given(st.lists(st.datetimes(min_value=datetime(1970, 1, 2), timezones=st.just(UTC)), max_size=5))
def test_times_sort_as_text_as_they_do_in_time(moments):
    assert sorted(map(to_text, moments)) == [to_text(moment) for moment in sorted(moments)]


def test_secrets_are_in_no_repr():
    ask = CreateSession.model_validate({"api_key": "k3y", "env": {"A": "s3cret"}})
    assert "k3y" not in repr(ask)
    assert "s3cret" not in repr(ask)
