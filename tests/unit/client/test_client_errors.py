"""Every error goes out through one table and comes back through the other as the same class."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instavm import errors
from instavm.client.errors import BY_STATUS, from_answer, tree
from instavm.control.api.errors import answer, status_of

ALL = sorted(set(tree()), key=lambda kind: kind.__name__)


def example(kind):
    if issubclass(kind, errors.InvalidInput):
        return kind("memory_mb", 9, "256 to 8192")
    return kind("what happened")


@pytest.mark.parametrize("kind", ALL)
def test_an_error_comes_back_as_what_it_was(kind):
    sent = answer(example(kind))
    back = from_answer(sent.status_code, sent.body)
    assert type(back) is kind
    assert str(back) == str(example(kind))
    if issubclass(kind, errors.InvalidInput):
        assert (back.field, back.allowed) == ("memory_mb", "256 to 8192")


@pytest.mark.parametrize("kind", ALL)
def test_every_error_has_a_status_and_a_code_of_its_own(kind):
    assert 400 <= status_of(example(kind)) <= 599
    assert [other for other in ALL if other.code == kind.code] == [kind]
    body = json.loads(answer(example(kind)).body)
    assert isinstance(body, dict)
    assert body["detail"]


def test_a_status_alone_is_enough_for_servers_that_send_no_code():
    for status, kind in BY_STATUS.items():
        back = from_answer(status, b'{"detail": "why"}')
        assert type(back) is kind
        assert "why" in str(back)


@given(st.integers(300, 599), st.binary(max_size=200))
def test_whatever_comes_back_is_some_error_of_ours(status, body):
    assert isinstance(from_answer(status, body), errors.InstaVMError)


def test_a_page_of_something_else_is_told_in_part():
    assert "<html>" in str(from_answer(502, b"<html>" + b"x" * 10_000))
    assert len(str(from_answer(502, b"<html>" + b"x" * 10_000))) < 600
